"""A transformer in one safetensors file, as ComfyUI loads it: its family, its configuration, where its weights are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ParallelismConfig
from ..families import (
    Family,
    Transformer,
    family_of_single_file,
    family_of_text_file,
    files_instead,
    supported_models,
)
from ..families.others import INSTEAD, SUFFIXES, looks_like_part, looks_like_transformer
from .config_files import blamed
from .model_folders import check_name, file_state
from .quantized import Quantization, read_quantization
from .safetensors_reader import StoredTensor, Weight, check_unused, read_header, read_metadata

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""In front of the transformer's keys: in files that may hold more than it, and in files of it alone."""


@dataclass(frozen=True)
class SingleFile:
    """What a single file says of itself.

    Args:
        path: of the file.
        family: of the model in it.
        transformer_config: of the diffusers class.
        transformer_weights: parameter of the diffusers class -> what it is made of.
    """

    path: Path
    family: Family
    transformer_config: dict[str, Any]
    transformer_weights: dict[str, Weight]
    components: tuple[str, ...] = ("transformer",)

    def check(self, layout: ParallelismConfig) -> None:
        """Raise ValueError if the layout does not fit the model."""
        self.family.transformer.check_layout(self.transformer_config, layout)

    def check_weights(self) -> None:
        """All was checked when the file was opened."""

    def weights(self, component: str) -> dict[str, Weight]:
        """What each parameter of the transformer is made of."""
        assert component == "transformer"
        return self.transformer_weights

    def fingerprint(self) -> str:
        """See `file_fingerprint`."""
        return file_fingerprint(self.path)


def file_fingerprint(path: Path) -> str:
    """Changes when the file, or what a link leads to, changes; ValueError where it is gone."""
    return file_state(path)


def check_suffix(path: Path) -> None:
    """Raise ValueError for files that are not called ``.safetensors`` (or ``.sft``), or by what is no text."""
    check_name(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".sft"):
        what = f" but {SUFFIXES[suffix]}" if suffix in SUFFIXES else ""
        raise ValueError(
            f"{path.name} is not a .safetensors file{what}; other formats (such as pickled .ckpt and .pt, or .gguf) "
            f"are not read: {INSTEAD}, in a .safetensors file"
        )


def open_single_file(path: Path) -> SingleFile:
    """Look at a single file; its header is read, and a few bytes that say how layers are quantized.

    Raises:
        ValueError: it is no safetensors file, is cut off, holds no known model, lacks a tensor or has one of a wrong
            shape, or is quantised in a way that is not read.
    """
    path = Path(path)
    check_suffix(path)
    stored = read_header(path)
    family, prefix = transformer_in(stored)
    if family is None:
        raise ValueError(_refusal(path, stored))
    keys = {key[len(prefix) :]: tensor for key, tensor in stored.items() if key.startswith(prefix)}
    quantization = read_quantization(path, keys, prefix)
    shapes, kind = quantization.shapes(), family.transformer
    with blamed(path):
        kind.check_metadata(read_metadata(path))
        config = kind.file_config(shapes)
        model = kind.build(config)
        weights = {name: _weight(kind, name, keys, quantization) for name, _ in model.named_parameters()}
    known = {tensor.key for weight in weights.values() for tensor, _, _ in weight.pieces}
    unused = [
        key
        for key in keys
        if prefix + key not in known and not quantization.is_beside(key) and key not in kind.file_marks
    ]
    for name, parameter in model.named_parameters():
        if weights[name].shape != tuple(parameter.shape):
            tensor, _, _ = weights[name].pieces[0]
            raise ValueError(
                f"{tensor.key} in {path} gives {name} the shape {list(weights[name].shape)}, but the rest of the file "
                f"makes it {list(parameter.shape)}; the file is damaged or of another model"
            )
    check_unused(unused, path, family.title)
    return SingleFile(path, family, config, weights)


def transformer_in(stored: Collection[str]) -> tuple[Family | None, str]:
    """The family of the transformer in a file with these keys, and what stands before its keys; None if there is none.

    Patches of a supported model are none, though their keys are the model's.
    """
    if looks_like_part(stored) is None:
        for prefix in PREFIXES:
            family = family_of_single_file([key[len(prefix) :] for key in stored if key.startswith(prefix)])
            if family is not None:
                return family, prefix
    return None, ""


def _refusal(path: Path, stored: Collection[str]) -> str:
    """Why a file that holds no supported transformer is not loaded."""
    look = looks_like_part(stored)
    family = family_of_text_file(stored)
    if look is None and family is not None:
        return f"{path} looks like the text encoder of {family.title}, which Load CLIP (Parallel) loads"
    look = look or looks_like_transformer(stored)
    if look is not None:
        return look.refusal(path, supported_models(), files_instead("transformer"))
    examples = ", ".join(list(stored)[:3])
    return f"{path} holds no model that is known here ({len(stored)} tensors, such as {examples}); {supported_models()}"


def _weight(kind: Transformer, name: str, keys: dict[str, StoredTensor], quantization: Quantization) -> Weight:
    """What a parameter is made of."""
    rows = kind.file_rows(name)
    pieces = []
    for key, part, parts in rows:
        tensor = keys.get(key)
        if tensor is None and key.endswith("norm.weight"):
            tensor = keys.get(f"{key[: -len('weight')]}scale")
        if tensor is None:
            raise ValueError(f"there is no tensor {key}; the checkpoint is incomplete")
        size = tensor.shape[0] if tensor.shape else 0
        pieces.append((tensor, size * part // parts, size * (part + 1) // parts))
    layer, _, leaf = rows[0][0].rpartition(".")
    if leaf != "weight":
        return Weight(tuple(pieces))
    if layer in quantization.layers:
        assert len({tensor for tensor, _, _ in pieces}) == 1, f"{name} is made of rows of several quantized tensors"
        return Weight(tuple(pieces), layer=quantization.layers[layer])
    return Weight(
        tuple(pieces), quantization.scale(layer), quantization.made_for_fp8(layer), quantization.input_scale(layer)
    )
