"""Rank 0 of a world that is not there: a process group whose collectives bring this rank's own tensors.

torch's fake process group leaves what it should receive as the memory was, which soon is not a number; a GPU multiplies
such matrices up to 15 % faster than real ones. Here an exchange copies what this rank sent, so that values stay finite
at the cost of one copy on the device.
"""

# mypy: disable-error-code="override, assignment, attr-defined, call-arg"
# What torch calls is looked up by name and has changed its name and its stubs between versions.

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

NAME = "alone"


def start_alone(world_size: int) -> None:
    """Make the default process group one of rank 0 among ``world_size`` ranks."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])
    dist.init_process_group(NAME, rank=0, world_size=world_size, store=dist.HashStore())


def _create(store: Any, rank: int, size: int, timeout: Any) -> AloneGroup:
    return AloneGroup(rank, size)


class AloneGroup(dist.ProcessGroup):
    """Collectives are over at once. Methods are those that torch looks for, under its old and its new names."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._size = size
        self._sent: Tensor | None = None

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return NAME

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return _over(tensors)

    allreduce_coalesced = broadcast = allreduce

    def barrier(self, opts: Any = None) -> Any:
        return _over([])

    def alltoall_base(self, out: Tensor, given: Tensor, out_sizes: Any, sizes: Any, opts: Any = None) -> Any:
        _repeat(out, given)
        return _over([out])

    all_to_all_single = alltoall_base

    def allgather(self, outs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> Any:
        for parts, tensor in zip(outs, given, strict=True):
            for part in parts:
                _repeat(part, tensor)
        return _over(outs)

    def _allgather_base(self, out: Tensor, given: Tensor, opts: Any = None) -> Any:
        _repeat(out, given)
        return _over([out])

    all_gather_single = reduce_scatter_single = _reduce_scatter_base = _allgather_base

    def allgather_into_tensor_coalesced(self, outs: list[Tensor], given: list[Tensor], opts: Any = None) -> Any:
        for out, tensor in zip(outs, given, strict=True):
            _repeat(out, tensor)
        return _over(outs)

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def scatter(self, outs: list[Tensor], given: list[list[Tensor]], opts: Any = None) -> Any:
        for out, tensors in zip(outs, given, strict=True):
            _repeat(out, tensors[0])
        return _over(outs)

    def send(self, tensors: list[Tensor], destination: int, tag: int = 0) -> Any:
        self._sent = tensors[0]
        return _over(tensors)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> Any:
        for tensor in tensors:
            if self._sent is None:
                tensor.zero_()
            else:
                _repeat(tensor, self._sent)
        return _over(tensors)


def _repeat(out: Tensor, given: Tensor) -> None:
    """Fill a tensor with the values of another, again and again."""
    values = given.detach().reshape(-1)
    if not values.numel():
        return
    whole, rest = divmod(out.numel(), values.numel())
    flat = out.detach().view(-1)
    if whole:
        flat[: whole * values.numel()].view(whole, -1).copy_(values)
    if rest:
        flat[whole * values.numel() :].copy_(values[:rest])


def _over(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)
