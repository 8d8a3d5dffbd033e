"""Wan's weights as ComfyUI names them: recognising them, the model's shape, and which tensor is which."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..file_shapes import count_blocks, shape_of

MARKS = ("head.modulation", "blocks.0.self_attn.norm_q.weight")
HEAD_DIM = 128
PATCH = (1, 2, 2)
FIRST_FRAME = "ref_conv.weight"
"""Of Fun Control: what embeds a reference image as a frame before the video."""
OTHERS = {
    "vace_patch_embedding.weight": "Wan VACE",
    "control_adapter.conv.weight": "Wan Fun Camera",
    "casual_audio_encoder.encoder.final_linear.weight": "Wan 2.2 S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan 2.2 Animate",
    "pose_patch_embedding.weight": "Wan 2.2 Animate",
    "patch_embedding_mask.weight": "SCAIL 2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
}
"""Keys of models that share Wan's blocks and have more -> what they are."""
KINDS = ("t2v", "i2v")
"""What a file may say of itself as ComfyUI's ``model_type``; others have the same tensors and compute other things."""
SUPPORTED = "T2V, I2V, first-last-frame, TI2V 5B, Fun Control, Fun Inpaint, ATI, WanMove and Phantom are"
_EMBEDDERS = {
    "time_embedder.linear_1": "time_embedding.0",
    "time_embedder.linear_2": "time_embedding.2",
    "time_proj": "time_projection.1",
    "text_embedder.linear_1": "text_embedding.0",
    "text_embedder.linear_2": "text_embedding.2",
    "image_embedder.norm1": "img_emb.proj.0",
    "image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "image_embedder.ff.net.2": "img_emb.proj.3",
    "image_embedder.norm2": "img_emb.proj.4",
}
_IN_BLOCK = {
    "norm2": "norm3",  # the one with weights, before cross-attention; ComfyUI counts it last
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_IN_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
_WHOLE = {
    "scale_shift_table": "head.modulation",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}


def is_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of a Wan transformer, or of a model around one."""
    return all(mark in keys for mark in MARKS)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise ValueError for a file that says that it is another model with the same tensors."""
    try:
        says = json.loads(metadata.get("config", "{}")).get("transformer", {})
        kind = "CausalAR" if says.get("causal_ar") else str(says.get("model_type", KINDS[0]))
    except (ValueError, AttributeError):
        return  # of somebody else's, for something else
    if kind not in KINDS:
        raise ValueError(f"this is Wan of the kind {kind}, which is not supported; {SUPPORTED}")


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of `WanTransformer3DModel`, read off the shapes in a single file.

    Beside diffusers' own there is ``first_frame_channels``, of Fun Control (`WanTransformer.build`).

    Raises:
        ValueError: a tensor that it says is missing, or it is a model of the family that is not supported.
    """
    for key, title in OTHERS.items():
        if key in shapes:
            raise ValueError(f"this is {title}, which is not supported; {SUPPORTED}")
    width, channels, *patch = shape_of(shapes, "patch_embedding.weight", dims=5)
    rows, _ = shape_of(shapes, "head.head.weight")
    if tuple(patch) != PATCH or width % HEAD_DIM or rows % 4:
        raise ValueError(
            f"its tokens are {patch} of a latent and have {width} features, of which the last linear makes {rows}; Wan "
            f"has patches of {list(PATCH)} and heads of {HEAD_DIM} features; the file is damaged or of another model"
        )
    config: dict[str, Any] = {
        "patch_size": list(PATCH),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": channels,
        "out_channels": rows // 4,
        "text_dim": shape_of(shapes, "text_embedding.0.weight")[1],
        "freq_dim": shape_of(shapes, "time_embedding.0.weight")[1],
        "ffn_dim": shape_of(shapes, "blocks.0.ffn.0.weight")[0],
        "num_layers": count_blocks(shapes, "blocks"),
    }
    if "img_emb.proj.1.weight" in shapes:
        config |= {"image_dim": shape_of(shapes, "img_emb.proj.1.weight")[1], "added_kv_proj_dim": width}
        if "img_emb.emb_pos" in shapes:
            config["pos_embed_seq_len"] = shape_of(shapes, "img_emb.emb_pos", dims=3)[1]
    if FIRST_FRAME in shapes:
        config["first_frame_channels"] = shape_of(shapes, FIRST_FRAME, dims=4)[1]
    return config


def rows_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Which tensor is a parameter of `WanTransformer3DModel`; see `Transformer.file_rows`."""
    if name in _WHOLE:
        return ((_WHOLE[name], 0, 1),)
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if block is not None:
        prefix, rest = block.groups()
        if rest == "scale_shift_table":
            return ((f"{prefix}.modulation", 0, 1),)
        module, _, leaf = rest.rpartition(".")
        first, _, part = module.partition(".")
        attention = {"attn1": "self_attn", "attn2": "cross_attn"}.get(first)
        module = _IN_BLOCK.get(module, module) if attention is None else f"{attention}.{_IN_ATTENTION[part]}"
        return ((f"{prefix}.{module}.{leaf}", 0, 1),)
    module, _, leaf = name.rpartition(".")
    if module == "proj_out":
        return ((f"head.head.{leaf}", 0, 1),)
    embedder = module.removeprefix("condition_embedder.")
    return ((f"{_EMBEDDERS.get(embedder, module)}.{leaf}", 0, 1),)
