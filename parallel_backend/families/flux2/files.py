"""FLUX.2's weights as Black Forest Labs and ComfyUI name them: recognising them, and which rows make what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..file_shapes import count_blocks

_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_THIRDS = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_OTHERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_FINAL = "final_layer.adaLN_modulation.1"
MARK = "double_stream_modulation_img.lin.weight"
"""A key that FLUX.2 has and FLUX.1 lacks."""


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of `Flux2Transformer2DModel`, read off the shapes of a single file's tensors.

    Args:
        shapes: key -> shape, without a prefix.

    Raises:
        ValueError: a tensor that says it is missing.
    """

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        found = shapes.get(f"{name}.weight", shapes.get(f"{name}.scale"))
        if found is None:
            raise ValueError(f"the file has no tensor {name}.weight; the checkpoint is incomplete")
        if len(found) != dims or 0 in found:
            raise ValueError(f"{name} has shape {list(found)}, where {dims} dims are expected; the file is damaged")
        return found

    width, channels = shape("img_in")
    (head,) = shape("double_blocks.0.img_attn.norm.query_norm", dims=1)
    return {
        "in_channels": channels,
        "out_channels": shape("final_layer.linear")[0],
        "num_layers": count_blocks(shapes, "double_blocks"),
        "num_single_layers": count_blocks(shapes, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("txt_in")[1],
        "timestep_guidance_channels": shape("time_in.in_layer")[1],
        "mlp_ratio": shape("double_blocks.0.img_mlp.2")[1] / width,
        "axes_dims_rope": [head // 4] * 4,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def rows_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Which rows of which tensors make a parameter of `Flux2Transformer2DModel`.

    Returns:
        ``(key, part, parts)``: of that tensor's rows, cut into so many equal parts, the one of this number. Several
        stand one after the other in the parameter.

    Raises:
        ValueError: a name that the model does not have.
    """
    module, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if block is None:
        if module == "norm_out.linear":
            # diffusers has the scale first, Black Forest Labs the shift.
            return (f"{_FINAL}.{leaf}", 1, 2), (f"{_FINAL}.{leaf}", 0, 2)
        if module in _OTHERS:
            return ((f"{_OTHERS[module]}.{leaf}", 0, 1),)
    else:
        single, index, part = block.groups()
        prefix = f"{'single' if single else 'double'}_blocks.{index}"
        if not single and part in _THIRDS:
            fused, third = _THIRDS[part]
            return ((f"{prefix}.{fused}.{leaf}", third, 3),)
        names = _SINGLE if single else _DOUBLE
        if part in names:
            return ((f"{prefix}.{names[part]}.{leaf}", 0, 1),)
    raise ValueError(f"FLUX.2 has no parameter {name}")
