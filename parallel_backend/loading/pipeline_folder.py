"""A diffusers pipeline folder: which family it is, its configurations, and whether its files are whole.

Looking at it reads a few kilobytes, so a wrong folder is refused before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ParallelismConfig
from ..families import Family, family_of_pipeline
from ..families.drawing import Drawing
from .safetensors_reader import Weight, check_unused, find_weight, index_folder, whole

MAX_ERROR = 500
"""Characters of another library's error that are passed on."""


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
        with self._building("transformer"):
            self.family.build_transformer(self.transformer_config)
        self.family.check_layout(self.transformer_config, layout)
        for component in self.components:
            self.weights(component)

    def weights(self, component: str) -> dict[str, Weight]:
        """What each tensor of the model of a component is made of."""
        in_text_encoder = {"text_encoder": self.family.text_keys, "vision_tower": self.family.vision_keys}
        if component in in_text_encoder:
            stored = index_folder(self.path / "text_encoder")
            return {name: whole(stored[key]) for name, key in in_text_encoder[component](list(stored)).items()}
        stored = index_folder(self.path / component)
        return {name: whole(tensor) for name, tensor in stored.items()}

    def check_weights(self) -> None:
        """Raise ValueError if a tensor is missing, unexpected, or of another shape than its configuration makes it.

        The models are built without memory for their weights, and of the files only headers are read.
        """
        models = {}
        with self._building("transformer"):
            models["transformer"] = self.family.build_transformer(self.transformer_config)
        with self._building("text_encoder"):
            models["text_encoder"] = self.family.build_text_model(self.text_config)
            if "vision_tower" in self.components:
                models["vision_tower"] = self.family.build_vision(self.text_config)
        with self._building("vae"):
            models["vae"] = self.family.build_vae(self.vae_config)
        for component, model in models.items():
            weights = self.weights(component)
            state = model.state_dict()
            for name, tensor in state.items():
                if not name.endswith("num_batches_tracked"):  # of no use in inference
                    find_weight(name, tensor.shape, weights)
            if component == "transformer":  # of the others, parts are left out on purpose
                unused = [weight.pieces[0][0] for name, weight in weights.items() if name not in state]
                if unused:
                    check_unused([tensor.key for tensor in unused], unused[0].file, type(model).__name__)

    @contextmanager
    def _building(self, component: str) -> Iterator[None]:
        """Errors of diffusers and transformers, of any kind, become ones that name the file that is at fault."""
        try:
            yield
        except Exception as error:
            file = self.path / component / "config.json"
            what = f"{type(error).__name__}: {error}"[:MAX_ERROR]
            raise ValueError(f"{file} describes no model that can be built ({what}); download it again") from None

    def fingerprint(self) -> str:
        """Changes when a configuration or weight file of the folder changes (by name, size and time)."""
        digest = hashlib.sha256()
        for file in files_of_folder(self.path):
            status = file.stat()
            digest.update(f"{file.relative_to(self.path)}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def files_of_folder(path: Path) -> list[Path]:
    """The files of a pipeline folder that say what it computes, sorted."""
    return [file for file in sorted(path.glob("**/*")) if file.suffix in (".json", ".safetensors", ".jinja")]


def open_pipeline_folder(path: Path) -> PipelineFolder:
    """Look at a pipeline folder.

    Raises:
        ValueError: it is not one, a part of it is missing, or its family is not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; name a diffusers pipeline folder (one with a model_index.json)")
    index = _read_json(path / "model_index.json", "it is not a diffusers pipeline folder")
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise ValueError(f"{path / 'model_index.json'} does not name a pipeline class")
    family = family_of_pipeline(class_name)
    configs = {}
    for component, expected in (
        ("transformer", family.transformer_class),
        ("text_encoder", family.text_encoder_class),
        ("vae", family.vae_class),
    ):
        stated = index.get(component)
        stated = stated[1] if isinstance(stated, list) and len(stated) == 2 else None
        if stated != expected:
            raise ValueError(f"{path} has {stated or 'no class'} as its {component}; {family.title} needs a {expected}")
        configs[component] = _read_json(path / component / "config.json", f"the pipeline's {component} is incomplete")
    if not (path / "tokenizer").is_dir():
        raise ValueError(f"{path} has no tokenizer folder: the pipeline is incomplete; download it again")
    components = ("transformer", "text_encoder", *(["vision_tower"] if family.has_vision_tower else []), "vae")
    return PipelineFolder(
        path, class_name, family, configs["transformer"], configs["text_encoder"], configs["vae"], components
    )


def _read_json(file: Path, meaning: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing: {meaning}")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object: {meaning}")
    return content
