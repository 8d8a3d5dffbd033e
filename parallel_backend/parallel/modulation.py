"""Modulation: many linears that run on the same vector once a step, sharded, with one gather for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..mesh import Axis, all_gather
from .tensor import ColumnParallelLinear


class GatheredTogether:
    """Column-parallel linears of one model that all run on the same vector in each forward.

    The first that is asked computes the rank's features of all of them, which travel in one gather. A forward that
    skips blocks computes theirs all the same: a few matrix-vector products cost less than a second gather.

    Args:
        linears: those that gather their output.
        axis: that they are sharded over.
    """

    def __init__(self, linears: Sequence[ColumnParallelLinear], axis: Axis) -> None:
        self.linears, self.axis = linears, axis
        self.outputs: dict[ColumnParallelLinear, Tensor] = {}
        for linear in linears:
            linear.together = self

    def begin(self, *_: object) -> None:
        """A forward begins: what is there belongs to another."""
        self.outputs.clear()

    def output(self, linear: ColumnParallelLinear, x: Tensor) -> Tensor:
        """All features ``[B, out]`` of one linear for the vectors ``x [B, in]``.

        Whoever comes first brings the most vectors; the others have as many, or fewer of the same from the first on.
        """
        if not self.outputs:
            local = [one.local(x) for one in self.linears]
            gathered = all_gather(torch.cat(local, dim=-1), self.axis)  # [degree, B, out_local of all]
            parts = gathered.split([part.shape[-1] for part in local], dim=-1)
            self.outputs = {one: part.movedim(0, -2).flatten(-2) for one, part in zip(self.linears, parts, strict=True)}
        found = self.outputs[linear]
        # Not a view where it need not be one: a compiler makes other code for views.
        return found if found.shape[0] == x.shape[0] else found[: x.shape[0]]


def gather_together(model: nn.Module, axis: Axis) -> None:
    """Have all column-parallel linears of a model that gather their output do so at once, in each forward."""
    linears = [m for m in model.modules() if isinstance(m, ColumnParallelLinear) and m.gather_output]
    if axis.is_split and linears:
        together = GatheredTogether(linears, axis)
        model.register_forward_pre_hook(together.begin)
        # Nothing is kept between forwards, in which the vectors of a large model are the only ones of their size.
        model.register_forward_hook(together.begin)
