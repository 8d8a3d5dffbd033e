"""Random weights in ComfyUI's number formats: what a model with quantized weights takes, without a file of it.

Numbers are made of each weight by itself, with scales that are the same for all of them, so that the shards of all
ranks are those of one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..parallel.formats import FORMATS, TILE_BLOCKS, TILE_ROWS
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
    form = "nvfp4" if weights == "nvfp4" else "int8_tensorwise"
    options = dict(FORMATS[form].options)
    if weights == "int8_convrot":
        options |= {"convrot": True, "convrot_groupsize": next(g for g in (256, 64, 16, 4, 1) if columns % g == 0)}
    rows, unit = FORMATS[form].grid(options)
    if any(size % unit for size in blocks) or weight.shape[0] % rows:
        return None
    parts = [_parts(part.float(), form, largest) for part in weight.split(list(blocks), dim=1)]
    layout = Layout(form, options, tuple(parts[0]), units and has_units(form, device))
    made = [Quantized(layout, tuple(one.values())) for one in parts]
    return made[0] if len(made) == 1 else SideBySide(made)


def _parts(weight: Tensor, form: str, largest: float) -> dict[str, Tensor]:
    rows, columns = weight.shape
    if form == "int8_tensorwise":
        scale = torch.full((rows, 1), largest / 127, device=weight.device)
        return {"weight": (weight / scale).round_().clamp_(-127, 127).to(torch.int8), "weight_scale": scale}
    between = torch.tensor([(a + b) / 2 for a, b in zip((0.0, *_E2M1), _E2M1, strict=False)], device=weight.device)
    code = torch.bucketize(weight.abs() * (_E2M1[-1] / largest), between).to(torch.uint8) | (weight < 0).byte() << 3
    tiles = -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // 16 // TILE_BLOCKS) * TILE_BLOCKS
    return {
        "weight": code[:, ::2] << 4 | code[:, 1::2],
        "weight_scale": torch.ones(tiles, device=weight.device).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.full((), largest / _E2M1[-1], device=weight.device),
    }
