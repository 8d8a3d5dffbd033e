"""Exchanges by copy engines as CPU ranks can have them: what arrives lies in slots, and is not a number until awaited.

Nobody copies into another's memory here; gloo carries what is sent. The rest is as it is on GPUs: slots are used again
in turn, and what was sent must not be written to before it was awaited.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_backend.blocks import double_stream as blocks
from parallel_backend.config import ParallelismConfig, Speed
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallel import copies
from parallel_backend.parallelize import parallelize_transformer
from tests.distributed.cases import FLUX2, flux2_inputs, relative_error, tiny_transformer


class Copies:
    """The slots of one group."""

    def __init__(self, group: dist.ProcessGroup, slots: int) -> None:
        self.group = group
        self.slots: list[Tensor | None] = [None] * slots
        # A ring's chunk is used after it was sent on; all else that was received has been used when more is sent.
        self.keeps = group.size() > 2 and slots == copies.ring_slots(group.size())
        self.next = 0
        self.in_flight: dict[int, tuple[Any, Tensor, Tensor, Tensor, Tensor]] = {}

    def send(self, x: Tensor, received: Sequence[int], sent: Sequence[int], size: int) -> Tensor:
        old = self.slots[self.next]
        if old is None or old.numel() < size:
            old = self.slots[self.next] = torch.empty(size)
        # What others send may come at any time after they were allowed to send it, and they may be ahead.
        for slot in (old,) if self.keeps else self.slots:
            if slot is not None and slot.untyped_storage().data_ptr() not in self.in_flight:
                slot.fill_(math.nan)
        total = sum(received)
        count = math.prod(x.shape[1:])
        received_here = old[: total * count].view(total, *x.shape[1:])
        arriving = torch.empty_like(received_here)
        assert x.is_contiguous()
        work = dist.all_to_all_single(arriving, x, list(received), list(sent), group=self.group, async_op=True)
        self.in_flight[old.untyped_storage().data_ptr()] = (work, arriving, received_here, x, x.clone())
        self.next = (self.next + 1) % len(self.slots)
        return received_here

    def wait(self, y: Tensor) -> None:
        work, arrived, slot, source, as_sent = self.in_flight.pop(y.untyped_storage().data_ptr())
        work.wait()
        assert torch.equal(source, as_sent), "what is in flight was written to"
        slot.copy_(arrived)


_of_groups: dict[tuple[str, int], Copies] = {}
"""By name of group and number of slots, as on GPUs."""


def _send(
    x: Tensor, received: Any, sent: Any, places: Any, tokens: Sequence[int], times: int, slots: int, name: str
) -> Tensor:
    key = name, slots
    if key not in _of_groups:
        _of_groups[key] = Copies(dist.distributed_c10d._resolve_process_group(name), slots)
    return _of_groups[key].send(x, received, sent, max(tokens) * times * math.prod(x.shape[1:]))


def _wait(y: Tensor, name: str) -> None:
    place = y.untyped_storage().data_ptr()
    next(group for (of, _), group in _of_groups.items() if of == name and place in group.in_flight).wait(y)


_library = torch.library.Library("hybrid_dit", "FRAGMENT")
_library.impl("send_rows", _send, "CPU")
_library.impl("await_rows", _wait, "CPU")


def errors(mesh: ParallelMesh, layout: ParallelismConfig, speed: Speed, **changes: Any) -> list[float]:
    """Errors of a model that exchanges by copies against the untouched one, for inputs of several sizes."""
    copying = {name: replace(getattr(mesh, name), copies=True) for name in ("ulysses", "ring", "tp")}
    copying = {name: axis for name, axis in copying.items() if axis.is_split}
    whole, model = tiny_transformer(**changes), tiny_transformer(**changes)
    blocks.TILE = 2
    torch._dynamo.reset()
    parallelize_transformer(model, FLUX2.transformer, layout, replace(mesh, **copying), speed)
    found = []
    for text, size in ((16, (8, 8)), (17, (7, 9)), (40, (3, 5))):
        inputs = flux2_inputs(text, [size], 1)
        found.append(relative_error(model(**inputs).sample, whole(**inputs).sample))
    assert all(not group.in_flight for group in _of_groups.values())
    return found
