"""Random weights in ComfyUI's number formats: what a model with quantized weights takes, without a file of it.

Numbers are made of each weight by itself, with scales that are the same for all of them, so that the shards of all
ranks are those of one model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..parallel.formats import FORMATS, GROUP, ROTATIONS, TILE_BLOCKS, TILE_ROWS, Options
from ..parallel.fp8 import Fp8, can_multiply, has_fp8_units
from ..parallel.products import Multiplier, Product
from ..parallel.quantized import Layout, Quantized, SideBySide, has_units
from ..parallel.tensor import ParamShard, hold

_SPAN = 4.0
"""Standard deviations that the largest number stands for."""
_E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""nvfp4's numbers beside 0; 16 in a block."""


@torch.no_grad()
def quantize(
    model: nn.Module, weights: str, table: Mapping[str, ParamShard], dtype: torch.dtype, units: bool = True
) -> None:
    """Hold the linears of a model's blocks in one of `shapes.WEIGHTS`; those off a format's grid stay as they are.

    Args:
        model: filled, rank-local.
        weights: which format.
        table: the slices that this rank holds.
        dtype: of the inputs.
        units: whether they are multiplied as they are held, where the device can.
    """
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear | Multiplier) or not any(part.isdecimal() for part in name.split(".")):
            continue
        weight, shard = linear.weight.data, table.get(f"{name}.weight")
        columns = weight.shape[1] if shard is None or shard.dim == 0 else shard.size
        blocks = [weight.shape[1]] if shard is None or shard.dim == 0 else [b - a for a, b in shard.ranges]
        scale = _SPAN * columns**-0.5
        product = _product(weight, blocks, weights, scale, columns, dtype, units)
        if product is not None:
            hold(model, name, product)


def _product(
    weight: Tensor,
    blocks: Sequence[int],
    weights: str,
    largest: float,
    columns: int,
    dtype: torch.dtype,
    units: bool,
) -> Product | None:
    device = weight.device
    if weights.startswith("fp8"):
        alpha = largest / torch.finfo(torch.float8_e4m3fn).max
        held = (weight / alpha).clamp(-448, 448).to(torch.float8_e4m3fn)
        units = units and weights == "fp8" and has_fp8_units(device) and can_multiply(held, dtype)
        scale = torch.full((), alpha, device=device)
        return Fp8(held, scale, alpha, torch.ones((), device=device) if units else None)
    form = _FORMS.get(weights, weights)
    options = dict(FORMATS[form].options)
    if "convrot_groupsize" in options and weights != "int8":
        group = next((size for size in reversed(ROTATIONS) if size <= GROUP and columns % size == 0), 0)
        if not group:
            return None
        options |= {"convrot_groupsize": group} | ({"convrot": True} if "convrot" in options else {})
    rows, unit = FORMATS[form].grid(options)
    if any(size % unit for size in blocks) or weight.shape[0] % rows:
        return None
    parts = [_PARTS[form](part.float(), largest, options) for part in weight.split(list(blocks), dim=1)]
    layout = Layout(form, options, tuple(parts[0]), units and has_units(form, device))
    made = [Quantized(layout, tuple(one.values())) for one in parts]
    return made[0] if len(made) == 1 else SideBySide(made)


def _int8(weight: Tensor, largest: float, options: Options) -> dict[str, Tensor]:
    scale = torch.full((len(weight), 1), largest / 127, device=weight.device)
    return {"weight": (weight / scale).round_().clamp_(-127, 127).to(torch.int8), "weight_scale": scale}


def _nvfp4(weight: Tensor, largest: float, options: Options) -> dict[str, Tensor]:
    between = torch.tensor([(a + b) / 2 for a, b in zip((0.0, *_E2M1), _E2M1, strict=False)], device=weight.device)
    code = torch.bucketize(weight.abs() * (_E2M1[-1] / largest), between).to(torch.uint8) | (weight < 0).byte() << 3
    return {
        "weight": code[:, ::2] << 4 | code[:, 1::2],
        "weight_scale": torch.ones(_tiles(weight, 16), device=weight.device).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.full((), largest / _E2M1[-1], device=weight.device),
    }


def _mxfp8(weight: Tensor, largest: float, options: Options) -> dict[str, Tensor]:
    exponent = math.ceil(math.log2(largest / torch.finfo(torch.float8_e4m3fn).max))
    scales = torch.full(_tiles(weight, 32), 127 + exponent, dtype=torch.uint8, device=weight.device)
    return {"weight": (weight / 2.0**exponent).clamp_(-448, 448).to(torch.float8_e4m3fn), "weight_scale": scales}


def _w4a8(weight: Tensor, largest: float, options: Options) -> dict[str, Tensor]:
    step = 16.0  # of 8 bits, for each of 4
    groups = weight.shape[1] // options["group_size"]
    return {
        "weight": _nibbles((weight * (7 / largest)).round_().clamp_(-7, 7) + 8),
        "weight_s_rel": torch.full((len(weight), groups), step, device=weight.device).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.full((len(weight),), largest / (7 * step), device=weight.device),
        "weight_codebook": torch.arange(-8.0, 8.0, device=weight.device),
    }


def _w4a4(weight: Tensor, largest: float, options: Options) -> dict[str, Tensor]:
    numbers = (weight * (7 / largest)).round_().clamp_(-7, 7).to(torch.int8)
    return {
        "weight": _nibbles(numbers & 15),
        "weight_scale": torch.full((len(weight),), largest / 7, device=weight.device),
    }


def _awq(weight: Tensor, largest: float, options: Options) -> dict[str, Tensor]:
    scale = torch.full(
        (weight.shape[1] // options["group_size"], len(weight)), largest / 7, dtype=torch.bfloat16, device=weight.device
    )
    numbers = (weight / scale[0, 0].float()).round_().clamp_(-8, 7) + 8
    return {"weight": _nibbles(numbers), "weight_scale": scale, "weight_zeros": torch.zeros_like(scale)}


def _nibbles(numbers: Tensor) -> Tensor:
    """Pairs of columns of 0 to 15 in a byte each, the even one in the low bits."""
    numbers = numbers.to(torch.uint8)
    return (numbers[:, ::2] | numbers[:, 1::2] << 4).view(torch.int8)


def _tiles(weight: Tensor, block: int) -> tuple[int, int]:
    rows, columns = weight.shape
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // block // TILE_BLOCKS) * TILE_BLOCKS


_FORMS = {"int8": "int8_tensorwise", "int8_convrot": "int8_tensorwise", "w4a8": "asym_w4a8_int8",
          "w4a4": "convrot_w4a4", "awq": "awq_w4a16"}  # fmt: skip
"""Of `shapes.WEIGHTS`, those that `FORMATS` has under another name."""
_PARTS: dict[str, Callable[[Tensor, float, Options], dict[str, Tensor]]] = {
    "int8_tensorwise": _int8,
    "nvfp4": _nvfp4,
    "mxfp8": _mxfp8,
    "asym_w4a8_int8": _w4a8,
    "convrot_w4a4": _w4a4,
    "awq_w4a16": _awq,
}
