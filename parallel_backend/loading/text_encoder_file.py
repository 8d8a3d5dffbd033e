"""A text encoder in one safetensors file, as ComfyUI loads it: its configuration, its weights, and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..config import ParallelismConfig
from ..families import FAMILIES, Family, family_of_text_file
from .quantized import BESIDE, read_quantization
from .safetensors_reader import StoredTensor, Weight, check_dtypes, check_unused, read_header, whole
from .single_file import check_suffix, file_fingerprint

KNOWN = (
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
    ("shared.weight", "T5"),
    ("text_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP"),
    ("model.layers.0.self_attn.q_norm.weight", "Qwen3 (of FLUX.2 klein and Z-Image)"),
    ("model.layers.0.self_attn.k_proj.bias", "Qwen2.5"),
    ("model.layers.0.pre_feedforward_layernorm.weight", "Gemma"),
    ("model.layers.0.self_attn.q_proj.weight", "Llama"),
    ("double_blocks.0.img_attn.qkv.weight", "a FLUX transformer, which Load Diffusion Model (Parallel) loads"),
)
"""Keys, and what a file that has one looks like, for the message that refuses it."""


@dataclass(frozen=True)
class TextEncoderFile:
    """What a text encoder's file says of itself.

    Args:
        path: of the file.
        family: whose text encoder it is.
        text_config: of the text encoder's class, as far as its text model goes.
        text_weights: parameter of the text model -> what it is made of.
        tokenizer: where the tokenizer is.
    """

    path: Path
    family: Family
    text_config: dict[str, Any]
    text_weights: dict[str, Weight]
    tokenizer: StoredTensor
    components: tuple[str, ...] = ("text_encoder",)

    def check(self, layout: ParallelismConfig) -> None:
        """Any layout will do: the text encoder is split over as many ranks as its heads divide by."""

    def check_weights(self) -> None:
        """All was checked when the file was opened."""

    def weights(self, component: str) -> dict[str, Weight]:
        """What each parameter of the text model is made of."""
        assert component == "text_encoder"
        return self.text_weights

    def fingerprint(self) -> str:
        """See `file_fingerprint`."""
        return file_fingerprint(self.path)

    def read_tokenizer(self) -> bytes:
        """The tokenizer, as the family's tokenizer class takes it."""
        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(self.tokenizer.key).numpy().tobytes()


def open_text_encoder_file(path: Path) -> TextEncoderFile:
    """Look at a text encoder's file; its header is read, and a few bytes that say how layers are quantized.

    Raises:
        ValueError: it is no safetensors file, is cut off, holds no text encoder that is known, lacks its tokenizer or a
            tensor, or has one too many, of a wrong shape, or quantized in a way that is not read.
    """
    path = Path(path)
    check_suffix(path)
    keys = read_header(path)
    family = family_of_text_file(keys)
    if family is None:
        looks = next((f"looks like {name}" for key, name in KNOWN if key in keys), f"has {len(keys)} tensors")
        known = "; ".join(f"{family.title}: {family.text_file_title}" for family in FAMILIES)
        raise ValueError(f"{path} {looks}, which is no text encoder that is supported here; supported are: {known}")
    quantization = read_quantization(path, keys, "")
    try:
        config = family.text_file_config({key: tensor.shape for key, tensor in keys.items()})
        model = family.build_text_model(config)
        names = family.text_keys(list(keys))
        weights = {}
        for name, key in names.items():
            layer = key.rpartition(".")[0]
            scale = quantization.scale(layer) if key.endswith(".weight") else None
            weights[name] = Weight(whole(keys[key]).pieces, scale)
        for name, parameter in model.named_parameters():
            if name not in weights:
                raise ValueError(f"there is no tensor model.{name}; the file is incomplete")
            found, made = weights[name].shape, tuple(parameter.shape)
            if found != made:
                raise ValueError(
                    f"{names[name]} has shape {list(found)}, but the rest of the file makes it {list(made)}; the file "
                    "is damaged or of another model"
                )
            check_dtypes(weights[name])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tokenizer = keys.get(family.text_file_tokenizer)
    if tokenizer is None or tokenizer.dtype != "U8":
        raise ValueError(
            f"{path} has no tokenizer (a tensor {family.text_file_tokenizer} of bytes); take a file that ComfyUI's "
            "templates name, such as mistral_3_small_flux2_bf16.safetensors"
        )
    _check_layers(path, family, names, [name for name, _ in model.named_parameters()])
    return TextEncoderFile(path, family, config, weights, tokenizer)


def _check_layers(path: Path, family: Family, names: dict[str, str], used: list[str]) -> None:
    """Raise ValueError for tensors in the layers that are used which have no place there."""
    layers = {_layer(name) for name in used}
    unused = [
        key
        for name, key in names.items()
        if name not in used and _layer(name) in layers and key.rpartition(".")[2] not in BESIDE
    ]
    check_unused(unused, path, f"the text encoder of {family.title}")


def _layer(name: str) -> str:
    """``layers.3`` of ``layers.3.mlp.up_proj.weight``."""
    return ".".join(name.split(".")[:2])
