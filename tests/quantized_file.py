"""Linears in every number format of ComfyUI, as comfy-kitchen's own classes write and read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

needs_kitchen = pytest.mark.skipif(find_spec("comfy_kitchen") is None, reason="comfy-kitchen is not installed")

FORMATS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {}, {}),
    "int8_rows": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8_convrot": (
        "int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, {"convrot": True},
    ),
    "nvfp4": ("nvfp4", "TensorCoreNVFP4Layout", {}, {}),
    "mxfp8": ("mxfp8", "TensorCoreMXFP8Layout", {}, {}),
    "w4a8": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {}, {}),
    "w4a4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {}, {}),
    "awq": ("awq_w4a16", "TensorCoreAWQW4A16Layout", {}, {}),
}  # fmt: skip
"""Name -> ComfyUI's name of the format, comfy-kitchen's class, how it quantizes, and what a file says of a layer."""
NATIVE = ("int8", "int8_rows", "int8_convrot", "w4a8", "w4a4")
"""Those that are multiplied as they are, on the CPU, too."""
ROTATED = ("int8_convrot", "w4a8", "w4a4")
GROUP = 64
"""Of awq."""


def quantize_weight(weight: Tensor, form: str, group: int = 256) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a weight by what stands behind its layer's name, and the weight that they are, in fp32."""
    import comfy_kitchen.tensor as kitchen

    _, name, how, _ = FORMATS[form]
    layout = getattr(kitchen, name)
    if form == "awq":
        return _awq(weight, layout)
    data, params = layout.quantize(weight, **how, **({} if group == 256 else {"convrot_groupsize": group}))
    parts = {f"weight{end}": part.contiguous() for end, part in layout.state_dict_tensors(data, params).items()}
    return parts, layout.dequantize(data, params).float()


def _awq(weight: Tensor, layout: Any) -> tuple[dict[str, Tensor], Tensor]:
    """comfy-kitchen reads this one, and does not write it: the middle of each group is its zero."""
    rows, columns = weight.shape
    groups = weight.view(rows, -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    zeros, scale = ((high + low) / 2).bfloat16(), ((high - low) / 15).bfloat16()
    numbers = ((groups - zeros.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    numbers = numbers.view(rows, columns).to(torch.uint8)
    data = (numbers[:, ::2] | numbers[:, 1::2] << 4).view(torch.int8)
    scale, zeros = scale.t().contiguous(), zeros.t().contiguous()
    params = layout.Params(
        scale=scale.float(), zeros=zeros.float(), orig_dtype=torch.float32, orig_shape=(rows, columns), group_size=GROUP
    )
    return {"weight": data, "weight_scale": scale, "weight_zeros": zeros}, layout.dequantize(data, params)


def quantize(
    tensors: Mapping[str, Tensor],
    form: str,
    part: str = "blocks",
    table: bool = False,
    nested: bool = False,
    as_bytes: bool = False,
    full_precision: bool = False,
    smooth: bool = False,
    group: int = 256,
    chosen: Callable[[str, Tensor], bool] = lambda name, tensor: True,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """A state dict with its linears in a format, the file's metadata, and what each tensor stands for.

    Args:
        tensors: without a prefix.
        form: one of `FORMATS`.
        part: of the names of what is quantized.
        table: whether the header says how, rather than a tensor beside each weight.
        nested: whether options stand in ``params``.
        as_bytes: whether scales in 8 bits, which safetensors has had no names for, are stored as bytes.
        full_precision: whether inputs are to stay as they are.
        group: columns that are rotated together, which a file says where they are not 256.
        smooth: with a ``pre_quant_scale``, which only nvfp4 has.
        chosen: which of the weights.
    """
    out: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or part not in name or not name.endswith(".weight") or not chosen(name, tensor):
            out[name] = meant[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        parts, dense = quantize_weight(tensor.float(), form, group)
        if smooth:
            parts["pre_quant_scale"] = torch.linspace(0.5, 1.5, tensor.shape[1])
            dense = dense * parts["pre_quant_scale"]
        if as_bytes:
            eight = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
            parts = {k: p.view(torch.uint8) if p.dtype in eight and k != "weight" else p for k, p in parts.items()}
        out |= {f"{layer}.{key}": value for key, value in parts.items()}
        meant[name] = dense
        options = FORMATS[form][3] | ({} if group == 256 else {"convrot_groupsize": group})
        layers[layer] = {"format": FORMATS[form][0], **({"params": options} if nested else options)}
        if full_precision:
            layers[layer]["full_precision_matrix_mult"] = True
        if not table:
            text = json.dumps(layers[layer]).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if table else {}
    return out, metadata, meant
