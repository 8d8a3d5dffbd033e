"""Whether the ranks of a mesh reach each other: a tiny exchange on every axis, before anything large is begun.

GPUs that cannot talk (no peer access, an IOMMU or ACS between them, a broken driver) hang in the first exchange, or get
something else than was sent. A thread of each rank keeps the time; which ranks wait for which names the pair.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...mesh import Axis, ParallelMesh, all_gather
from ...parallel import exchange


@dataclass(frozen=True)
class Unreached:
    """What did not come to its end.

    Args:
        axis: on which, or what else was being done.
        ranks: that this one waited for, of the whole group.
        seconds: that it waited; 0 where something arrived that nobody had sent.
    """

    axis: str
    ranks: tuple[int, ...]
    seconds: float


class UnreachedError(RuntimeError):
    """Ranks do not reach each other: something arrived that was not sent."""

    def __init__(self, unreached: Unreached) -> None:
        super().__init__(f"what came from rank {unreached.ranks} on the axis {unreached.axis} is not what was sent")
        self.unreached = unreached


Tell = Callable[[Unreached], None]


class MeshCheck:
    """Exchanges on the axes of a mesh, each with a deadline. Collective.

    Args:
        device: of this rank.
        seconds: most that one exchange may take; 0: any time.
        tell: called in a thread of its own when one takes longer, while this one still waits.
    """

    def __init__(self, device: torch.device, seconds: float, tell: Tell) -> None:
        self.device, self.seconds, self.tell = device, seconds, tell

    @contextlib.contextmanager
    def within(self, axis: str, ranks: Sequence[int]) -> Iterator[None]:
        """What is done meanwhile has a deadline; ``ranks`` are waited for."""
        unreached = Unreached(axis, tuple(ranks), self.seconds)
        timer = threading.Timer(self.seconds, self.tell, [unreached])
        timer.daemon = True
        if self.seconds:
            timer.start()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            timer.cancel()

    def meet(self) -> None:
        """Wait for all ranks, however long they are busy with something else. Nothing of a GPU takes part."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(torch.zeros(1))

    def run(self, mesh: ParallelMesh) -> None:
        """Exchange on every axis that is split what it is going to exchange, in small.

        Raises:
            UnreachedError: something else arrived than was sent.
        """
        if mesh.ulysses.is_split:
            self._all_to_all("ulysses", mesh.ulysses)
        if mesh.ring.is_split:
            self._shift("ring", mesh.ring, 1)
        if mesh.tp.is_split:
            self._all_reduce("tp", mesh.tp)
        if mesh.cp.is_split:
            self._gather("ring and ulysses", mesh.cp)
        if mesh.world.is_split and mesh.world.group not in (mesh.tp.group, mesh.cp.group):
            self._all_reduce("all ranks", mesh.world)

    def _all_to_all(self, name: str, axis: Axis) -> None:
        if not axis.copies:  # one partner after the other, so that it is known which one does not answer
            for distance in range(1, axis.degree):
                self._shift(name, axis, distance)
            return
        with self.within(name, _others(axis)):
            reached(name)
            exchange.begin(axis)
            rows = torch.full((axis.degree, 1), float(axis.rank), device=self.device)
            found = exchange.arrived(exchange.spread_heads(rows, [1] * axis.degree, axis)).flatten().tolist()
        _compare(name, axis, found, list(range(axis.degree)))

    def _shift(self, name: str, axis: Axis, distance: int) -> None:
        """Send to the rank so far ahead, and receive from the one so far behind."""
        ahead, behind = ((axis.rank + step) % axis.degree for step in (distance, -distance))
        members = _members(axis)
        with self.within(name, sorted({members[ahead], members[behind]})):
            reached(name)
            own = torch.full((1, 1), float(axis.rank), device=self.device)
            if axis.copies:
                exchange.begin(axis)
                there = exchange.arrived(exchange.shift(own, 1, axis, [1] * axis.degree))
            else:
                there = torch.empty_like(own)
                # Not an all-to-all of which only these two parts have rows: gloo has its ranks wait for all others.
                pair = [dist.P2POp(dist.isend, own, members[ahead], axis.group)]
                pair.append(dist.P2POp(dist.irecv, there, members[behind], axis.group))
                for work in dist.batch_isend_irecv(pair):
                    work.wait()
            found = there.flatten().tolist()
        _compare(name, axis, found, [behind])

    def _all_reduce(self, name: str, axis: Axis) -> None:
        with self.within(name, _others(axis)):
            reached(name)
            exchange.begin(axis)
            own = torch.full((1, 1), float(axis.rank), device=self.device)
            found = exchange.arrived(exchange.all_reduce(own, axis)).flatten().tolist()
        if found != [float(sum(range(axis.degree)))]:
            raise UnreachedError(Unreached(name, tuple(_others(axis)), 0.0))

    def _gather(self, name: str, axis: Axis) -> None:
        with self.within(name, _others(axis)):
            reached(name)
            found = all_gather(torch.full((1,), float(axis.rank), device=self.device), axis).flatten().tolist()
        _compare(name, axis, found, list(range(axis.degree)))


def reached(name: str) -> None:
    """An exchange on an axis is about to begin; tests have it never end."""


def _members(axis: Axis) -> list[int]:
    """The ranks of an axis, among all of the group."""
    assert axis.group is not None
    return dist.get_process_group_ranks(axis.group)


def _others(axis: Axis) -> list[int]:
    return [rank for place, rank in enumerate(_members(axis)) if place != axis.rank]


def _compare(name: str, axis: Axis, found: Sequence[float], senders: Sequence[int]) -> None:
    wrong = [sender for value, sender in zip(found, senders, strict=True) if value != sender]
    if wrong:
        members = _members(axis)
        raise UnreachedError(Unreached(name, tuple(members[sender] for sender in wrong), 0.0))
