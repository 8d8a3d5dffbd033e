"""Random FLUX.2 transformers in one file, under Black Forest Labs' names, as ComfyUI's users have them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HEAD = 128
"""Width of a head; ComfyUI's FLUX.2 knows no other."""
CHANNELS, TEXT, TIME = 128, 192, 256


def flux2_shapes(heads: int = 2, double: int = 2, single: int = 3, guidance: bool = True) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict without a prefix."""
    width, mlp = heads * HEAD, 3 * heads * HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (width, CHANNELS),
        "txt_in.weight": (width, TEXT),
        "time_in.in_layer.weight": (width, TIME),
        "time_in.out_layer.weight": (width, width),
        "double_stream_modulation_img.lin.weight": (6 * width, width),
        "double_stream_modulation_txt.lin.weight": (6 * width, width),
        "single_stream_modulation.lin.weight": (3 * width, width),
        "final_layer.linear.weight": (CHANNELS, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
    }
    if guidance:
        shapes |= {"guidance_in.in_layer.weight": (width, TIME), "guidance_in.out_layer.weight": (width, width)}
    for index in range(double):
        for side in ("img", "txt"):
            prefix = f"double_blocks.{index}.{side}"
            shapes |= {
                f"{prefix}_attn.qkv.weight": (3 * width, width),
                f"{prefix}_attn.proj.weight": (width, width),
                f"{prefix}_attn.norm.query_norm.scale": (HEAD,),
                f"{prefix}_attn.norm.key_norm.scale": (HEAD,),
                f"{prefix}_mlp.0.weight": (2 * mlp, width),
                f"{prefix}_mlp.2.weight": (width, mlp),
            }
    for index in range(single):
        prefix = f"single_blocks.{index}"
        shapes |= {
            f"{prefix}.linear1.weight": (3 * width + 2 * mlp, width),
            f"{prefix}.linear2.weight": (width, width + mlp),
            f"{prefix}.norm.query_norm.scale": (HEAD,),
            f"{prefix}.norm.key_norm.scale": (HEAD,),
        }
    return shapes


def flux2_tensors(**size: Any) -> dict[str, Tensor]:
    """A state dict, fp32, random."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (shape[1] ** -0.5 if len(shape) > 1 else 0.1)
        + (len(shape) == 1)
        for name, shape in flux2_shapes(**size).items()
    }


def to_fp8(
    tensors: Mapping[str, Tensor],
    layout: str,
    matmul: bool = False,
    full_precision: Collection[str] = (),
    input_scales: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    part: str = "blocks",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The blocks' linears in 8 bits with a scale each, in one of ComfyUI's layouts, and the file's metadata.

    Args:
        tensors: without a prefix.
        layout: ``"metadata"`` (a table in the header, ``weight_scale``), ``"comfy_quant"`` (a tensor a layer) or
            ``"scaled_fp8"`` (the older one: a marker and ``scale_weight``).
        matmul: whether the file is made for multiplying in 8 bits.
        full_precision: layers that are not, all the same (not in the older layout).
        input_scales: layer -> what its inputs are divided by.
        dtype: of 8 bits.
        part: of the names of what is stored in 8 bits.
    """
    out: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    old = layout == "scaled_fp8"
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or part not in name:
            out[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        layer, scale = name.removesuffix(".weight"), tensor.abs().max() / torch.finfo(dtype).max
        out[name] = (tensor / scale).to(dtype)
        out[f"{layer}.{'scale_weight' if old else 'weight_scale'}"] = scale.float()
        if input_scales and layer in input_scales:
            out[f"{layer}.{'scale_input' if old else 'input_scale'}"] = torch.tensor(input_scales[layer])
        layers[layer] = {"format": str(dtype).removeprefix("torch.")}
        if not matmul or layer in full_precision:
            layers[layer]["full_precision_matrix_mult"] = True
        if layout == "comfy_quant":
            out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(layers[layer]).encode()), dtype=torch.uint8)
    if old:
        out["scaled_fp8"] = torch.zeros(0 if matmul else 2, dtype=dtype)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return out, metadata if layout == "metadata" else {}


def to_fp8_rows(
    tensors: Mapping[str, Tensor], part: str = "", keep_dims: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Linears in 8 bits with a scale for each row, as LightX2V writes them, and what each tensor then stands for.

    Args:
        tensors: without a prefix.
        part: of the names of what is stored in 8 bits.
        keep_dims: whether scales are ``[rows, 1]``, not ``[rows]``.
    """
    out: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or part not in name or not name.endswith(".weight"):
            out[name] = meant[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True).float() / torch.finfo(torch.float8_e4m3fn).max
        out[name] = (tensor / scale).to(torch.float8_e4m3fn)
        out[f"{name}_scale"] = scale if keep_dims else scale[:, 0].contiguous()
        meant[name] = out[name].float() * scale
    return out, meant


def write(path: Path, tensors: Mapping[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    return path
