"""Small random Wan transformers in one file, under the names that ComfyUI's users have them by."""

from __future__ import annotations

import torch
from torch import Tensor

HEAD = 128
"""Width of a head; ComfyUI's Wan knows no other."""
CONTEXT = 4096
"""Features of a token of the text; ComfyUI's Wan knows no other."""
IMAGE = 1280
"""Features of an image's tokens; ComfyUI's Wan knows no other."""


def wan_shapes(
    heads: int = 2,
    layers: int = 2,
    channels: int = 16,
    out: int = 16,
    mlp: int = 640,
    image: bool = False,
    image_places: int = 0,
    first_frame: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict without a prefix.

    Args:
        heads, layers, mlp: of the blocks.
        channels, out: of what goes in and comes out.
        image: whether there are weights for an image's tokens (2.1 I2V).
        image_places: tokens of the images that have places of their own (2.1 FLF2V).
        first_frame: channels of the reference image that there is a convolution for (Fun Control).
    """
    width = heads * HEAD
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (width, channels, 1, 2, 2)}
    shapes["patch_embedding.bias"] = (width,)
    linears = {
        "text_embedding.0": (width, CONTEXT), "text_embedding.2": (width, width), "time_embedding.0": (width, 256),
        "time_embedding.2": (width, width), "time_projection.1": (6 * width, width), "head.head": (4 * out, width),
    }  # fmt: skip
    if image:
        linears |= {"img_emb.proj.1": (IMAGE, IMAGE), "img_emb.proj.3": (width, IMAGE)}
        for norm, size in (("img_emb.proj.0", IMAGE), ("img_emb.proj.4", width)):
            shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    if image_places:
        shapes["img_emb.emb_pos"] = (1, image_places, IMAGE)
    if first_frame:
        shapes |= {"ref_conv.weight": (width, first_frame, 2, 2), "ref_conv.bias": (width,)}
    shapes["head.modulation"] = (1, 2, width)
    for index in range(layers):
        block = f"blocks.{index}"
        shapes |= {f"{block}.modulation": (1, 6, width), f"{block}.norm3.weight": (width,)}
        shapes[f"{block}.norm3.bias"] = (width,)
        for attention in ("self_attn", "cross_attn"):
            linears |= {f"{block}.{attention}.{part}": (width, width) for part in "qkvo"}
            shapes |= {f"{block}.{attention}.norm_{part}.weight": (width,) for part in "qk"}
        if image:
            linears |= {f"{block}.cross_attn.{part}_img": (width, width) for part in "kv"}
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (width,)
        linears |= {f"{block}.ffn.0": (mlp, width), f"{block}.ffn.2": (width, mlp)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def wan_tensors(seed: int = 0, **size: object) -> dict[str, Tensor]:
    """A state dict, fp32, random: attention is sharp, and neither norms nor tables of modulation are plain."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in wan_shapes(**size).items():  # type: ignore[arg-type]
        values = torch.randn(shape, generator=generator)
        if "norm" in name or name.startswith(("img_emb.proj.0", "img_emb.proj.4")):
            values = 0.2 * values + (2.0 if "norm_" in name else 1.0) * name.endswith("weight")
        elif name.endswith(".bias") or name.endswith("emb_pos"):
            values = 0.1 * values
        elif name.endswith("modulation"):
            values = 0.5 * values
        else:
            values = values * values[0].numel() ** -0.5
        tensors[name] = values
    return tensors
