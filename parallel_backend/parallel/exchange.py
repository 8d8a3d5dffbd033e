"""Collectives that are started before, and waited for after, the work that they run under, in eager and compiled code.

They run as kernels of NCCL (gloo on CPUs), or by the GPUs' copy engines (`copies`) on an axis that says so. Either way
torch.compile traces them, and keeps their buffers until what was started has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..mesh import Axis
from . import copies

_functional = torch.ops._c10d_functional


class InFlight(NamedTuple):
    """What an exchange brings; nobody may read it until `arrived` or `summands` has given it."""

    tensor: Tensor
    source: Tensor
    """What was sent, and must not be written to until then."""
    group: str = ""
    """Whose copy engines are at work; empty where it is NCCL or gloo."""
    adds: bool = False
    """Whether what arrives is still to be added to what was sent."""


def begin(axis: Axis) -> None:
    """A forward begins, whatever became of the one before it."""
    if axis.copies:
        copies.begin(axis.name)


def spread_heads(x: Tensor, tokens: Sequence[int], axis: Axis) -> InFlight:
    """Start to give each rank its heads of this rank's tokens: ``[degree * S_local, ...] -> [sum(tokens), ...]``.

    Args:
        x: the heads of the first rank for all tokens, then those of the second, and so on.
        tokens: S_local of each rank of the axis.
    """
    sent, places = [tokens[axis.rank]] * axis.degree, [sum(tokens[: axis.rank])] * axis.degree
    return _exchange(x, tokens, sent, axis, places, tokens, axis.degree, copies.ALL_TO_ALL_SLOTS)


def gather_heads(x: Tensor, tokens: Sequence[int], axis: Axis) -> InFlight:
    """Start the way back of `spread_heads`: ``[sum(tokens), ...] -> [degree * S_local, ...]``."""
    received, places = [tokens[axis.rank]] * axis.degree, [axis.rank * count for count in tokens]
    return _exchange(x, received, tokens, axis, places, tokens, axis.degree, copies.ALL_TO_ALL_SLOTS)


def shift(x: Tensor, received: int, axis: Axis, tokens: Sequence[int]) -> InFlight:
    """Start to send all rows ``[S, ...]`` to a ring's next rank, and to receive ``received`` of the previous one.

    Args:
        tokens: rows that each rank began with.
    """
    return _shift(x, received, axis, tokens, copies.ring_slots(axis.degree))


def all_reduce(x: Tensor, axis: Axis) -> InFlight:
    """Start to sum a contiguous tensor over an axis, in its own memory."""
    if axis.copies and axis.degree == 2:  # sums of more ranks go in steps, which need SMs
        rows = x.view(-1, x.shape[-1])
        theirs = _shift(rows, rows.shape[0], axis, [rows.shape[0]], copies.ALL_REDUCE_SLOTS).tensor
        return InFlight(theirs, x, axis.name, adds=True)
    if torch.compiler.is_compiling():
        # The compiler finds out that it may reuse the memory.
        return InFlight(_functional.all_reduce(x, "sum", axis.name), x)
    return InFlight(_functional.all_reduce_(x, "sum", axis.name), x)


def arrived(moving: InFlight) -> Tensor:
    """The tensor, once what was started has ended; on a GPU its stream waits, not the host."""
    first, *second = summands(moving)
    return first.add_(second[0]) if second else first


def summands(moving: InFlight) -> tuple[Tensor, ...]:
    """As `arrived`; but of a sum that is yet to be taken both terms, of which the first is this rank's own memory."""
    if not moving.group:
        return (_functional.wait_tensor(moving.tensor),)
    copies.await_rows(moving.tensor, moving.group)
    return (moving.source, moving.tensor.view_as(moving.source)) if moving.adds else (moving.tensor,)


def _shift(x: Tensor, received: int, axis: Axis, tokens: Sequence[int], slots: int) -> InFlight:
    sent_to, received_from = [0] * axis.degree, [0] * axis.degree
    sent_to[(axis.rank + 1) % axis.degree] = x.shape[0]
    received_from[(axis.rank - 1) % axis.degree] = received
    return _exchange(x, received_from, sent_to, axis, [0] * axis.degree, tokens, 1, slots)


def _exchange(
    x: Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    axis: Axis,
    places: Sequence[int],
    tokens: Sequence[int],
    times: int,
    slots: int,
) -> InFlight:
    """Start to exchange rows ``[sum(sent), ...] -> [sum(received), ...]``; see `copies.PeerCopies.send`."""
    if not axis.copies:
        return InFlight(_functional.all_to_all_single(x, list(received), list(sent), axis.name), x)
    y = copies.send_rows(x, list(received), list(sent), places, list(tokens), times, slots, axis.name)
    return InFlight(y, x, axis.name)
