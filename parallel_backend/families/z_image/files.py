"""Z-Image's weights as ComfyUI names them: recognising them, the model's shape, and which rows make what."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..file_shapes import count_blocks, shape_of

MARKS = ("cap_pad_token", "x_embedder.weight")
"""Lumina 2, of which it came, has no such token, and diffusers another name for the second."""
OMNI, PIXELS = "siglip_embedder.0.weight", "dec_net.cond_embed.weight"
EMBEDDER, FINAL = "all_x_embedder.2-1", "all_final_layer.2-1"
_THIRDS = ("to_q", "to_k", "to_v")
_IN_ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
CHANNELS, PATCH_AREA = 16, 4


def is_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of a Z-Image transformer."""
    return all(mark in keys for mark in MARKS)


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of `ZImageTransformer2DModel`, read off the shapes in a single file.

    Raises:
        ValueError: a tensor that it says is missing, or it is a model of the family that is not supported.
    """
    for mark, title in ((OMNI, "Z-Image-Omni"), (PIXELS, "Z-Image in pixel space")):
        if mark in shapes:
            raise ValueError(f"this is {title}, which is not supported; Z-Image and Z-Image-Turbo are")
    width, patch = shape_of(shapes, "x_embedder.weight")
    (head,) = shape_of(shapes, "layers.0.attention.q_norm.weight", dims=1)
    rows, _ = shape_of(shapes, "layers.0.attention.qkv.weight")
    if patch != CHANNELS * PATCH_AREA or rows != 3 * width or width % head or head % 8:
        raise ValueError(
            f"its tokens have {patch} features, its blocks {width} and {rows} of queries, keys and values in heads of "
            f"{head}; Z-Image has {CHANNELS * PATCH_AREA}, and three times as many rows as features"
        )
    return {
        "in_channels": CHANNELS,
        "dim": width,
        "n_layers": count_blocks(shapes, "layers"),
        "n_refiner_layers": count_blocks(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": shape_of(shapes, "cap_embedder.1.weight")[1],
        "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
    }


def rows_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Which rows of which tensors make a parameter of `ZImageTransformer2DModel`; see `Transformer.file_rows`."""
    block = re.fullmatch(r"((?:layers|noise_refiner|context_refiner)\.\d+)\.(.+)\.(\w+)", name)
    if block is None:
        return ((name.replace(EMBEDDER, "x_embedder").replace(FINAL, "final_layer"), 0, 1),)
    prefix, module, leaf = block.groups()
    part = module.removeprefix("attention.")
    if part in _THIRDS:
        return ((f"{prefix}.attention.qkv.{leaf}", _THIRDS.index(part), 3),)
    return ((f"{prefix}.{module.replace(part, _IN_ATTENTION.get(part, part))}.{leaf}", 0, 1),)
