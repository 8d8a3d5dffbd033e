"""Exchanges among the GPUs of one host by their copy engines, which leave all SMs to the GEMMs that run meanwhile.

NCCL's kernels take SMs from a GEMM that runs beside them, and wait for it where it has taken all of them. Here a rank
copies what it sends straight into the memory of the rank that receives it (PyTorch's symmetric memory), and then a 1
into a flag beside it; only the wait for the flags is a kernel.

What arrives lies in one of a few slots, which others overwrite some exchanges later. Nobody is asked whether a slot is
free again: that a rank sends a later exchange says so, as it has used what came earlier by then. How many slots that
takes is said below. At the start of a forward, where an earlier one may have broken off, all ranks meet.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import socket
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..machine import missing_build_tools

try:
    import triton
    import triton.language as tl

    @triton.jit
    def _await_kernel(flags, first, ranks):
        flag = flags + (first + tl.program_id(0)) % ranks
        while tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys") != 1:
            pass

except ImportError:  # where PyTorch comes without Triton
    triton = None
if missing_build_tools():
    triton = None


GRANULE = 2**21
"""Bytes that a slot's size is rounded up to."""
ALL_TO_ALL_SLOTS = 2
"""One is in flight at a time: who sends the next but one has received the next, whose sender had used this one."""
ALL_REDUCE_SLOTS = 6
"""Of two ranks. At most three are in flight, so who sends the sixth after this one knows that it was used."""


def ring_slots(degree: int) -> int:
    """Of a ring's hops, one in flight at a time.

    A chunk is used after it was sent on, and the news of it goes all the way round. But nobody begins an attention
    before all have ended the last but one, so no more than the hops of two are ever needed.
    """
    return min(degree + 2, 2 * (degree - 1))


class _Slot(NamedTuple):
    memory: Tensor
    """This rank's, in bytes."""
    of_ranks: list[Tensor]
    """The same slot of every rank."""


class _InFlight(NamedTuple):
    """What has been sent, and is expected, and not yet awaited."""

    slot: int
    first_sender: int
    senders: int
    source: Tensor
    """Which is read until then: a compiler may have made it for this alone, and drops it at once."""


class PeerCopies:
    """The slots of one axis, and where its next exchange goes. Every rank makes the same exchanges in the same order.

    Args:
        group: of ranks on one host whose GPUs reach each other's memory.
        slots: how many.
    """

    def __init__(self, group: dist.ProcessGroup, slots: int) -> None:
        self.group, self.rank, self.degree = group, group.rank(), group.size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        # A copy's start must not wait for the GEMM that it runs under.
        self.stream = torch.cuda.Stream(self.device, priority=-1)
        self.slots: list[_Slot | None] = [None] * slots
        self.sent = [torch.cuda.Event() for _ in range(slots)]
        self.outgrown: list[_Slot] = []  # which a recorded graph may still write to
        self.next = 0
        self.begun = 0
        """Exchanges, and forwards, that this rank has begun."""
        self.in_flight: dict[int, _InFlight] = {}  # by the address of their slot
        self.one = torch.ones(1, dtype=torch.int32, device=self.device)
        self.flags = _symmetric(slots * self.degree, torch.int32, self.device)
        self.handle = _rendezvous(self.flags, group)
        self.flags_of_ranks = [
            self.handle.get_buffer(rank, (slots, self.degree), torch.int32) for rank in range(self.degree)
        ]
        self.begin()

    def begin(self) -> None:
        """A forward begins: whatever was under way on any rank is over and forgotten."""
        self.begun += 1
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.handle.barrier()
        self.flags.zero_()
        self.handle.barrier()
        self.in_flight.clear()
        self.next = 0

    def send(
        self,
        x: Tensor,
        received: Sequence[int],
        sent: Sequence[int],
        places: Sequence[int],
        tokens: Sequence[int],
        times: int,
    ) -> Tensor:
        """Start to exchange rows ``[sum(sent), ...] -> [sum(received), ...]``.

        Args:
            x: contiguous; nobody writes to it until `wait`.
            received, sent: rows from and to each rank.
            places: for each rank, the row of its result at which what it gets from this one begins.
            tokens, times: no rank receives more rows than the largest of tokens so many times; the same on all ranks.

        Returns:
            In a slot, what is in flight.
        """
        self.begun += 1
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        slot = self._slot(self.next, max(tokens) * times * row_bytes)
        data = x.view(-1).view(torch.uint8)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for step in range(1, self.degree + 1):  # so that not all send to the same rank at first; the own part last
                to = (self.rank + step) % self.degree
                if not sent[to]:
                    continue
                first, size, at = (count * row_bytes for count in (sum(sent[:to]), sent[to], places[to]))
                slot.of_ranks[to][at : at + size].copy_(data[first : first + size], non_blocking=True)
                if to != self.rank:
                    self.flags_of_ranks[to][self.next, self.rank : self.rank + 1].copy_(self.one, non_blocking=True)
            self.sent[self.next].record(self.stream)
        senders = [rank for rank in range(self.degree) if received[rank] and rank != self.rank]
        # All others send, or the previous one alone.
        first_sender = senders[0] if len(senders) == 1 else (self.rank + 1) % self.degree
        self.in_flight[_place(slot.memory)] = _InFlight(self.next, first_sender, len(senders), x)
        self.next = (self.next + 1) % len(self.slots)
        total = sum(received)
        return slot.memory[: total * row_bytes].view(x.dtype).view(total, *x.shape[1:])

    def has_sent(self, y: Tensor) -> bool:
        """Whether a tensor is in flight here."""
        return _place(y) in self.in_flight

    def wait(self, y: Tensor) -> None:
        """Have the current stream wait until what was sent has left, and what was to come is there."""
        slot, first, senders, _ = self.in_flight.pop(_place(y))
        torch.cuda.current_stream(self.device).wait_event(self.sent[slot])
        if senders:
            _await_kernel[(senders,)](self.flags[slot * self.degree :], first, self.degree, num_warps=1)

    def _slot(self, index: int, size: int) -> _Slot:
        slot = self.slots[index]
        if slot is not None and slot.memory.numel() >= size:
            return slot
        if slot is not None:
            self.outgrown.append(slot)
        memory = _symmetric(-(-size // GRANULE) * GRANULE, torch.uint8, self.device)
        handle = _rendezvous(memory, self.group)
        of_ranks = [handle.get_buffer(rank, memory.shape, torch.uint8) for rank in range(self.degree)]
        slot = self.slots[index] = _Slot(memory, of_ranks)
        return slot


def _place(x: Tensor) -> int:
    """Where a slot begins; a tensor of no rows has no address, but its memory has."""
    return x.untyped_storage().data_ptr()


def _symmetric(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(count, dtype=dtype, device=device)


def _rendezvous(x: Tensor, group: dist.ProcessGroup) -> Any:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.rendezvous(x, group)


_of_groups: dict[str, dict[int, PeerCopies]] = {}
"""By name of group, since axes of several meshes may share one, and by number of slots: exchanges that need more have
their own. Those that need as many are of models whose forwards take turns, each of which begins anew."""


def obstacle(group: dist.ProcessGroup) -> str:
    """Why the ranks of a group cannot copy into each other's memory; empty where they can. Collective."""
    if not torch.cuda.is_available() or "nccl" not in str(dist.get_backend_config(group)):
        return "the ranks are on CPUs"
    own = torch.tensor([_machine(), torch.cuda.current_device(), int(triton is not None)], device="cuda")
    facts = own.new_empty(group.size(), len(own))
    dist.all_gather_into_tensor(facts, own, group=group)
    hosts, devices, kernels = facts.T.tolist()
    if len(set(hosts)) > 1:
        return "the ranks are on several hosts"
    if len(set(devices)) < len(devices):
        return "ranks share a GPU"
    if not all(kernels):
        return "Triton, which the wait for them needs, cannot run here"
    for a in devices:
        for b in devices:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"GPU {a} does not reach the memory of GPU {b}"
    return ""


def usable(wanted: bool, warn: Callable[[str], None] = warnings.warn) -> bool:
    """Whether the ranks exchange by copy engines: where that is wanted, and all GPUs reach each other's memory.

    Collective, over the default process group.

    Args:
        wanted: on all ranks alike.
        warn: takes a text, if it is wanted and cannot be.
    """
    if not wanted or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    assert dist.group.WORLD is not None
    why_not = obstacle(dist.group.WORLD)
    if why_not:
        warn(f"ranks exchange without copy engines, since {why_not}")
    return not why_not


def _machine() -> int:
    """What tells this machine from others: names of hosts need not be unique among containers."""
    name = socket.gethostname().encode()
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", "rb") as file:
        name += file.read()
    return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")


def begun(group_name: str) -> int:
    """How many exchanges and forwards this rank of a group has begun."""
    return sum(copies.begun for copies in _of_groups.get(group_name, {}).values())


def held_bytes() -> int:
    """Memory of this rank that is set aside for exchanges, which PyTorch's allocator does not count."""
    everything = [copies for of_group in _of_groups.values() for copies in of_group.values()]
    slots = [slot for copies in everything for slot in (*copies.slots, *copies.outgrown)]
    return sum(slot.memory.nbytes for slot in slots if slot is not None)


def begin(group_name: str) -> None:
    """A forward begins on this rank of a group."""
    for copies in _of_groups.get(group_name, {}).values():
        copies.begin()


def _send(
    x: Tensor,
    received: Sequence[int],
    sent: Sequence[int],
    places: Sequence[int],
    tokens: Sequence[int],
    times: int,
    slots: int,
    group_name: str,
) -> Tensor:
    of_group = _of_groups.setdefault(group_name, {})
    if slots not in of_group:
        of_group[slots] = PeerCopies(dist.distributed_c10d._resolve_process_group(group_name), slots)  # type: ignore[arg-type]
    return of_group[slots].send(x, received, sent, places, tokens, times)


def _wait(y: Tensor, group_name: str) -> None:
    next(copies for copies in _of_groups[group_name].values() if copies.has_sent(y)).wait(y)


# The compiler takes what `send_rows` returns for memory of its own; it must not put anything else there (`forwards`).
_library = torch.library.Library("hybrid_dit", "FRAGMENT")
_library.define(
    "send_rows(Tensor x, SymInt[] received, SymInt[] sent, SymInt[] places, SymInt[] tokens, int times, int slots, "
    "str group) -> Tensor",
    tags=(torch.Tag.needs_exact_strides,),
)
_library.define("await_rows(Tensor(a!) y, str group) -> ()", tags=(torch.Tag.needs_exact_strides,))
_library.impl("send_rows", _send, "CUDA")
_library.impl("await_rows", _wait, "CUDA")
torch.library.register_fake(
    "hybrid_dit::send_rows",
    lambda x, received, sent, places, tokens, times, slots, group: x.new_empty(sum(received), *x.shape[1:]),
    lib=_library,
)
torch.library.register_fake("hybrid_dit::await_rows", lambda y, group: None, lib=_library)
send_rows, await_rows = torch.ops.hybrid_dit.send_rows, torch.ops.hybrid_dit.await_rows
