"""Collectives that are started before, and waited for after, the work that they run under, in eager and compiled code.

What a function here returns is in flight: nobody may read it until `arrived`. The functional collectives that they use
are traced by torch.compile, which keeps their buffers alive until then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mesh import Axis

_functional = torch.ops._c10d_functional


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], axis: Axis) -> Tensor:
    """Start to exchange rows ``[sum(sent), ...] -> [sum(received), ...]``; both list one number a rank of the axis."""
    return _functional.all_to_all_single(x, list(received), list(sent), axis.name)


def shift(x: Tensor, received: int, axis: Axis) -> Tensor:
    """Start to send all rows ``[S, ...]`` to a ring's next rank, and to receive ``received`` of the previous one."""
    sent_to, received_from = [0] * axis.degree, [0] * axis.degree
    sent_to[(axis.rank + 1) % axis.degree] = x.shape[0]
    received_from[(axis.rank - 1) % axis.degree] = received
    return all_to_all(x, received_from, sent_to, axis)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Start to sum a tensor over an axis, in its own memory."""
    if torch.compiler.is_compiling():
        return _functional.all_reduce(x, "sum", axis.name)  # the compiler finds out that it may reuse the memory
    return _functional.all_reduce_(x, "sum", axis.name)


def arrived(x: Tensor) -> Tensor:
    """The tensor, once what was started has ended; on a GPU its stream waits, not the host."""
    return _functional.wait_tensor(x)
