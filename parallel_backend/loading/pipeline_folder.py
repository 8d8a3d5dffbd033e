"""A diffusers pipeline folder: which family it is, its configurations, and whether its files are whole.

Looking at it reads a few kilobytes, so a wrong folder is refused before any worker starts.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ParallelismConfig
from ..families import Family, Model, family_of_pipeline
from ..families.drawing import Drawing
from .config_files import blamed, read_config, read_object
from .safetensors_reader import Weight, check_unused, find_weight, index_folder, whole


@dataclass(frozen=True)
class PipelineFolder:
    """What a pipeline folder says of itself."""

    path: Path
    pipeline_class: str
    family: Family
    transformer_config: dict[str, Any]
    text_config: dict[str, Any]
    vae_config: dict[str, Any]
    components: tuple[str, ...] = ("transformer", "text_encoder", "vae")

    @property
    def drawing(self) -> Drawing:
        """How its pipeline draws a picture."""
        return self.family.drawing(self.pipeline_class)

    def check(self, layout: ParallelismConfig) -> None:
        """Raise ValueError if the layout does not fit the model, or if a weight file is missing or damaged."""
        # What the others' configurations say is looked at when the models are built.
        self._build_transformer()
        self.family.transformer.check_layout(self.transformer_config, layout)
        for component in self.components:
            self.weights(component)

    def weights(self, component: str) -> dict[str, Weight]:
        """What each tensor of the model of a component is made of."""
        kind = self.family.needs_text_encoder()
        in_text_encoder = {"text_encoder": kind.keys, "vision_tower": kind.vision_keys}
        if component in in_text_encoder:
            stored = index_folder(self.path / "text_encoder")
            with blamed(self.path / "text_encoder"):
                names = in_text_encoder[component](list(stored))
            return {name: whole(stored[key]) for name, key in names.items()}
        stored = index_folder(self.path / component)
        return {name: whole(tensor) for name, tensor in stored.items()}

    def check_weights(self) -> None:
        """Raise ValueError if a tensor is missing, unexpected, or of another shape than its configuration makes it.

        The models are built without memory for their weights, and of the files only headers are read.
        """
        for component, model in self._build().items():
            weights = self.weights(component)
            state = model.state_dict()
            with blamed(self.path / component):
                for name, tensor in state.items():
                    if not name.endswith("num_batches_tracked"):  # of no use in inference
                        find_weight(name, tensor.shape, weights)
            if component == "transformer":  # of the others, parts are left out on purpose
                unused = [weight.pieces[0][0] for name, weight in weights.items() if name not in state]
                if unused:
                    check_unused([tensor.key for tensor in unused], unused[0].file, type(model).__name__)

    def _build_transformer(self) -> Model:
        """The transformer of its configuration, from which all is read that is needed of it later."""
        with blamed(self._config("transformer")):
            kind = self.family.transformer
            kind.plan(self.transformer_config)
            kind.activation_width(self.transformer_config, 1)
            return kind.build(self.transformer_config)

    def _build(self) -> dict[str, Model]:
        """The models of all components, likewise."""
        models = {"transformer": self._build_transformer()}
        encoder, vae = self.family.needs_text_encoder(), self.family.needs_vae()
        with blamed(self._config("text_encoder")):
            models["text_encoder"] = encoder.build(self.text_config)
            if "vision_tower" in self.components:
                models["vision_tower"] = encoder.build_vision(self.text_config)
            encoder.plan(self.text_config)
            encoder.degree(self.text_config, 1)
            encoder.layers(self.text_config)
        with blamed(self._config("vae")):
            models["vae"] = vae.build(self.vae_config)
            vae.width(self.vae_config)
        return models

    def _config(self, component: str) -> Path:
        return self.path / component / "config.json"

    def fingerprint(self) -> str:
        """Changes when a configuration or weight file of the folder changes (by name, size and time)."""
        digest = hashlib.sha256()
        for file in files_of_folder(self.path):
            status = file.stat()
            digest.update(f"{file.relative_to(self.path)}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def files_of_folder(path: Path) -> list[Path]:
    """The files of a pipeline folder that say what it computes, sorted."""
    suffixes = (".json", ".safetensors", ".jinja")
    return [file for file in sorted(path.glob("**/*")) if file.suffix in suffixes and file.is_file()]


def open_pipeline_folder(path: Path) -> PipelineFolder:
    """Look at a pipeline folder.

    Raises:
        ValueError: it is not one, a part of it is missing, or its family is not supported.
    """
    path = Path(path)
    if not os.path.isdir(path):  # False also for what can be no path
        raise ValueError(f"{path} is not a folder; name a diffusers pipeline folder (one with a model_index.json)")
    index_file = path / "model_index.json"
    index = read_object(index_file, "it is not a diffusers pipeline folder")
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ValueError(f"{index_file} does not name a pipeline class")
    with blamed(index_file):
        family = family_of_pipeline(class_name)
    configs, encoder = {}, family.needs_text_encoder()
    for component, expected in (
        ("transformer", family.transformer.class_name),
        ("text_encoder", encoder.class_name),
        ("vae", family.needs_vae().class_name),
    ):
        stated = index.get(component)
        found = stated[1] if isinstance(stated, list) and len(stated) == 2 else None
        if found != expected:
            raise ValueError(f"{path} has {found or 'no class'} as its {component}; {family.title} needs a {expected}")
        configs[component] = read_config(path / component / "config.json", f"the pipeline's {component} is incomplete")
    if not (path / "tokenizer").is_dir():
        raise ValueError(f"{path} has no tokenizer folder: the pipeline is incomplete; download it again")
    components = ("transformer", "text_encoder", *(["vision_tower"] if encoder.has_vision_tower else []), "vae")
    return PipelineFolder(
        path, class_name, family, configs["transformer"], configs["text_encoder"], configs["vae"], components
    )
