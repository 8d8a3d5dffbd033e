"""A linear's output for two inputs side by side, one of which is there earlier: how FLUX.2's single-stream blocks end.

The earlier is the MLP's, the later attention's, and what is computed of the earlier hides the other's exchanges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import exchange, long_mlp
from ..parallel.elementwise import Pieces
from ..parallel.long_mlp import Mlp, mlp_in_pieces, mlp_in_place
from ..parallel.products import Product, product_of
from ..parallel.tensor import Model, RowParallelLinear
from .double_stream import halves, own_bias


class Early(NamedTuple):
    """Of a linear for two inputs side by side: its outputs for the second of them, in pieces along a dim."""

    outputs: Sequence[Callable[[], Tensor]]
    """Compute a piece each, as memory that may be written to."""
    late: Product
    """What the other inputs are multiplied with."""
    dim: int = 1


def early_output(linear: Model, x: Tensor) -> Early:
    """The half of a linear's output that is of ``x`` ``[B, S, early]``, its last input features."""
    late, early = _halves(linear, x.shape[-1])
    parts, dim = halves(x) if type(linear) is RowParallelLinear else ((x,), 1)
    bias = own_bias(linear)
    return Early([functools.partial(early.product, part, bias) for part in parts], late, dim)


def early_output_of_long(linear: Model, normed: Tensor, into: Product, into_bias: Tensor | None, waits: bool) -> Early:
    """As `early_output`, for what an MLP makes of many tokens: a piece of them at a time.

    Args:
        linear: the MLP's output is the last of its input features.
        normed: the MLP's input, contiguous ``[B, S, C]``; it is used up.
        into, into_bias: what the MLP begins with, of ``[2 F, C]``.
        waits: whether attention waits for an exchange: a part of the tokens is computed now.
    """
    late, out = _halves(linear, into.shape[0] // 2)
    mlp = Mlp(into, into_bias, out, own_bias(linear)).repeated(normed.dtype)
    if type(linear) is RowParallelLinear:
        parts, dim = halves(normed)
        outputs: list[Callable[[], Tensor]] = [functools.partial(mlp_in_pieces, part, mlp) for part in parts]
        if waits:
            first = outputs[0]()
            outputs[0] = lambda: first
        return Early(outputs, late, dim)
    now = long_mlp.PIECE if waits else 0
    # What is sent and what arrives are there at the same time as this part of the MLP.
    mlp_in_place(normed, 0, now, long_mlp.PIECE // 2, mlp)

    def rest() -> Tensor:
        mlp_in_place(normed, now, normed.shape[0] * normed.shape[1], long_mlp.PIECE, mlp)
        return normed

    return Early([rest], late)


def two_part_output(linear: Model, early: Early, late: Callable[[], Tensor], waits: bool) -> Pieces:
    """A linear's output ``[B, S, out]`` for two inputs side by side, of which the second half is there earlier.

    Args:
        linear: of ``late`` and ``early`` features.
        early: what it makes of its last features.
        late: gives ``[B, S, late]``.
        waits: whether ``late`` waits for an exchange; all of ``early`` is computed before it is asked for.
    """
    summed = type(linear) is RowParallelLinear
    done = [output() for output in early.outputs] if waits else []
    inputs = late()
    pieces, first = [], 0
    for index, output in enumerate(early.outputs):
        y = done[index] if waits else output()
        size = y.shape[early.dim]
        x = inputs.narrow(early.dim, first, size)
        # Where nothing is summed the compiler makes the product one with the gated sum that comes next.
        apart = summed or not torch.compiler.is_compiling()
        y = early.late.add_to(y, x) if apart else early.late.added(y, x)
        pieces.append(exchange.all_reduce(y, linear.axis) if summed else y)
        first += size
    return Pieces(pieces, early.dim)


def _halves(linear: Model, early: int) -> tuple[Product, Product]:
    """What a linear multiplies its first features with, and its last."""
    product = product_of(linear)
    return product.split_columns(product.shape[1] - early)
