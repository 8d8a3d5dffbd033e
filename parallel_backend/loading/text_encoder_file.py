"""A text encoder in one safetensors file, as ComfyUI loads it: its configuration, its weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ParallelismConfig
from ..families import FAMILIES, Family, Model, family_of_text_file, files_instead
from ..families.others import looks_like_part, looks_like_text_encoder
from .all_in_one import text_encoder_keys
from .config_files import blamed
from .file_reader import FileReader
from .quantized import Quantization, read_quantization
from .safetensors_reader import StoredTensor, Weight, check_dtypes, check_unused, read_header, whole
from .single_file import check_suffix, file_fingerprint, transformer_in


@dataclass(frozen=True)
class TextEncoderFile:
    """What a text encoder's file says of itself.

    Args:
        path: of the file.
        family: whose text encoder it is.
        text_config: of the text encoder's class, as far as its text model goes.
        text_weights: parameter of the text model -> what it is made of.
        vision_weights: the same of the vision tower; empty where there is none.
        tokenizer: where the tokenizer is; None where ComfyUI has it itself.
    """

    path: Path
    family: Family
    text_config: dict[str, Any]
    text_weights: dict[str, Weight]
    vision_weights: dict[str, Weight]
    tokenizer: StoredTensor | None

    @property
    def components(self) -> tuple[str, ...]:
        return ("text_encoder", "vision_tower") if self.vision_weights else ("text_encoder",)

    def check(self, layout: ParallelismConfig) -> None:
        """Any layout will do: the text encoder is split over as many ranks as its heads divide by."""

    def check_weights(self) -> None:
        """All was checked when the file was opened."""

    def weights(self, component: str) -> dict[str, Weight]:
        """What each parameter of the text model or the vision tower is made of."""
        return {"text_encoder": self.text_weights, "vision_tower": self.vision_weights}[component]

    def fingerprint(self) -> str:
        """See `file_fingerprint`."""
        return file_fingerprint(self.path)

    def read_tokenizer(self) -> bytes:
        """The tokenizer, as the family's tokenizer class takes it; ValueError where it cannot be read."""
        assert self.tokenizer is not None
        with FileReader() as reader:
            return reader.whole(self.tokenizer).numpy().tobytes()


def open_text_encoder_file(path: Path, in_checkpoint: bool = False) -> TextEncoderFile:
    """Look at a text encoder's file; its header is read, and a few bytes that say how layers are quantized.

    Args:
        path: of the file.
        in_checkpoint: it is one with a transformer, too, whose family the text encoder is of (`all_in_one`).

    Raises:
        ValueError: it is no safetensors file, is cut off, holds no text encoder that is known, lacks its tokenizer or a
            tensor, or has one too many, of a wrong shape, or quantized in a way that is not read.
    """
    path = Path(path)
    check_suffix(path)
    keys, prefix = read_header(path), ""
    if in_checkpoint:
        family, _ = transformer_in(keys)
        with blamed(path):
            keys, prefix = text_encoder_keys(keys)
        if family is None or family.text_encoder is None or not family.text_encoder.is_file(keys):
            raise ValueError(_refusal(path, keys, f"{prefix}* in "))
    else:
        family = family_of_text_file(keys)
    if family is None or looks_like_part(keys) is not None:
        raise ValueError(_refusal(path, keys))
    quantization = read_quantization(path, keys, prefix)
    vision = {}
    kind = family.needs_text_encoder()
    with blamed(path):
        config = kind.file_config(quantization.shapes())
        names = kind.keys(list(keys))
        text = _weights(kind.build(config), names, keys, quantization)
        if kind.has_vision_tower and "vision_config" in config:
            vision = _weights(kind.build_vision(config), kind.vision_keys(list(keys)), keys, quantization)
    tokenizer = None
    if kind.file_tokenizer is not None:
        tokenizer = keys.get(kind.file_tokenizer)
        if tokenizer is None or tokenizer.dtype != "U8":
            raise ValueError(
                f"{path} has no tokenizer (a tensor {kind.file_tokenizer} of bytes); take a file that ComfyUI's "
                f"templates name: {kind.file_title}"
            )
    _check_layers(path, family, names, list(text), quantization)
    return TextEncoderFile(path, family, config, text, vision, tokenizer)


def _refusal(path: Path, keys: Collection[str], part: str = "") -> str:
    """Why a file (or a part of one) that holds no supported text encoder is not loaded."""
    family, _ = transformer_in(keys)
    if family is not None:
        return f"{path} looks like the transformer of {family.title}, which Load Diffusion Model (Parallel) loads"
    encoders = {family.title: family.text_encoder for family in FAMILIES}
    supported = "; ".join(f"{title}: {kind.file_title}" for title, kind in encoders.items() if kind is not None)
    look = looks_like_part(keys) or looks_like_text_encoder(keys)
    if look is not None:
        return look.refusal(f"{part}{path}", f"supported are: {supported}", files_instead("text_encoder"))
    return (
        f"{part}{path} has {len(keys)} tensors, which is no text encoder that is known here; supported are: {supported}"
    )


def _weights(
    model: Model, names: Mapping[str, str], keys: Mapping[str, StoredTensor], quantization: Quantization
) -> dict[str, Weight]:
    """What each parameter of a model is made of; ``names`` has its key."""
    weights = {}
    for name, parameter in model.named_parameters():
        if name not in names:
            raise ValueError(f"there is no tensor {_example(names)}{name}; the file is incomplete")
        key = names[name]
        layer = key.removesuffix(".weight")
        if layer in quantization.layers:
            weight = Weight(whole(keys[key]).pieces, layer=quantization.layers[layer])
        else:
            weight = Weight(whole(keys[key]).pieces, quantization.scale(layer) if layer != key else None)
        weights[name] = weight
        if weight.shape != tuple(parameter.shape):
            raise ValueError(
                f"{key} has shape {list(weight.shape)}, but the rest of the file makes it {list(parameter.shape)}; the "
                "file is damaged or of another model"
            )
        check_dtypes(weight)
    return weights


def _example(names: Mapping[str, str]) -> str:
    """What stands before a name in the file."""
    name, key = next(iter(names.items()))
    return key.removesuffix(name)


def _check_layers(
    path: Path, family: Family, names: dict[str, str], used: list[str], quantization: Quantization
) -> None:
    """Raise ValueError for tensors in the layers that are used which have no place there."""
    layers = {_layer(name) for name in used}
    unused = [
        key
        for name, key in names.items()
        if name not in used and _layer(name) in layers and not quantization.is_beside(key)
    ]
    check_unused(unused, path, f"the text encoder of {family.title}")


def _layer(name: str) -> str:
    """``layers.3`` of ``layers.3.mlp.up_proj.weight``."""
    return ".".join(name.split(".")[:2])
