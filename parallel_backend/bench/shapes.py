"""The shapes that are timed: models by their configuration alone. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Args:
        transformer: diffusers class, which names the family.
        side: pixels along a side, by default; of a video those of its width.
        features: of the context.
        depths: values of the configuration that count the blocks.
        config: of the transformer; what it leaves out has diffusers' defaults.
        text_config: of the text encoder; None where the workers know none of this shape, so that it is not timed. Empty
            for that of the family's reference model.
        text_tokens: of a prompt.
        height: pixels, where it is not ``side``.
        frames: of pixels, by default.
    """

    transformer: str
    side: int
    features: int
    depths: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    text_config: Mapping[str, Any] | None = field(default_factory=dict)
    text_tokens: int = 512
    height: int = 0
    frames: int = 1


WEIGHTS = ("fp8", "fp8 as storage", "int8", "int8_convrot", "nvfp4", "mxfp8", "w4a8", "w4a4", "awq")
"""What the blocks' linears can be held as, beside the number format of the rest; all but fp8 need comfy-kitchen."""
FLUX2 = "Flux2Transformer2DModel"
WAN = "WanTransformer3DModel"
FLUX2_DEPTHS = ("num_layers", "num_single_layers")
SHAPES = {
    "flux2-dev": Shape(FLUX2, 1024, 15360, FLUX2_DEPTHS),
    "qwen-image": Shape("QwenImageTransformer2DModel", 1328, 3584, ("num_layers",)),
    # FLUX.2-klein-4B. Its text encoder is a Qwen3 4B.
    "klein-4b": Shape(
        FLUX2,
        1024,
        7680,
        FLUX2_DEPTHS,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        text_config=None,
    ),
    "wan-14b": Shape(WAN, 832, 4096, ("num_layers",), text_config=None, height=480, frames=81),
    "wan-14b-i2v": Shape(WAN, 832, 4096, ("num_layers",), {"in_channels": 36}, text_config=None, height=480, frames=81),
    "wan-5b": Shape(
        WAN,
        1280,
        4096,
        ("num_layers",),
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        text_config=None,
        height=704,
        frames=121,
    ),
    "tiny": Shape(
        FLUX2,
        128,
        192,
        FLUX2_DEPTHS,
        {
            "num_layers": 2,
            "num_single_layers": 3,
            "num_attention_heads": 8,
            "attention_head_dim": 16,
            "joint_attention_dim": 192,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        {
            "text_config": {
                "model_type": "mistral",
                "vocab_size": 1024,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 5,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 16,
            },
            "text_encoder_out_layers": (1, 2, 4),
        },
        text_tokens=64,
    ),
}


def shape_of(name: str) -> Shape:
    """The shape of a name.

    Raises:
        ValueError: there is none; names those that there are.
    """
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r} to time; there are: {', '.join(SHAPES)}")
    return SHAPES[name]
