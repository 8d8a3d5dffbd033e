"""Eviction: which components have to leave the devices so that the next one fits. All ranks decide as one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ...limits import memory
from ...mesh import Axis
from ...parallel import graphs
from ...planning.memory import GIB
from .component import Component, Place

HOST_RESERVE = 2 * GIB
"""Host memory that stays free when parts move there."""


class Eviction:
    """Frees memory on all ranks of a group.

    Args:
        device: this rank's.
        axis: all ranks.
        notify: told what users should know.
        available, host_available: bytes that could be allocated on the device now, and bytes of host memory for this
            rank.
        held: bytes of the device that others cannot have, whether this process uses them or not; None: there is no
            such device.
        trim: gives back those of them that are not used.
    """

    def __init__(
        self,
        device: torch.device,
        axis: Axis,
        notify: Callable[[str], None],
        available: Callable[[], int] | None = None,
        host_available: Callable[[], int] | None = None,
        held: Callable[[], int] | None = None,
        trim: Callable[[], object] | None = None,
    ) -> None:
        self.device, self.axis, self.notify = device, axis, notify
        on_gpu = device.type == "cuda"
        self.held = held or ((lambda: torch.cuda.memory_reserved(device)) if on_gpu else None)
        self.trim = trim or (torch.cuda.empty_cache if on_gpu else lambda: None)
        self.host_available = host_available or host_bytes
        self.available = available or (self._device_bytes if device.type == "cuda" else self.host_available)

    def _device_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        # What torch has set aside and does not use is as good as free, but for what a CUDA graph uses.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + max(0, unused - graphs.held_bytes())

    def least_available(self) -> int:
        """Bytes available on the fullest device. Collective."""
        return -self.most(-self.available())

    def has(self, size: int) -> bool:
        """Whether every rank has so many of its own bytes available. Collective."""
        return self.most(size - self.available()) <= 0

    def make(self, weights: int, workspace: int, what: str, parts: Sequence[tuple[Component, bool]]) -> int:
        """Have parts leave until there is room. Collective.

        Args:
            weights: bytes that this rank is about to allocate, exactly.
            workspace: bytes that it should have beside them, about.
            what: is going to be there, for messages.
            parts: what may leave, the first one first, and whether nobody needs it any more.

        Returns:
            Bytes that the fullest device lacks of the workspace, with all parts gone; 0 where there is room.

        Raises:
            ValueError: there is no room for the weights even with all parts gone, by how much, and what to do.
        """
        for part, orphan in parts:
            if part.place is not Place.DEVICE:
                continue
            if self.has(weights + workspace):
                return 0
            self.leave(part, f"to make room for {what}", for_good=orphan)
        missing = self.most(weights - self.available())
        if missing > 0:
            needed = self.most(weights)
            raise ValueError(
                f"{what} needs {needed / GIB:.1f} GiB on each device, {missing / GIB:.1f} GiB more than can be made "
                "free on the fullest one; take a larger TP degree or more devices, or end other programs on them"
            )
        return max(0, self.most(weights + workspace - self.available()))

    def leave(self, part: Component, why: str, for_good: bool = False) -> None:
        """Free a part's memory on the device: it moves to host memory, or is read again later. Collective.

        On the CPU there is no other memory to move to. ``for_good`` says that it is not expected back.
        """
        size = self.most(part.nbytes)
        where = f"{size / GIB:.1f} GiB a rank of the {part.label}"
        on_gpu = self.held is not None
        if on_gpu and not for_good and self.fits_host(part):
            part.to_host()
            self.notify(f"{where} moved to host memory {why}")
        else:
            short = "" if for_good or not on_gpu else self._no_host_room(part)
            part.drop()
            self.notify(f"{where} unloaded {why}" + ("" if for_good else f"; the next use reads it again{short}"))
        self.trim()

    def lend(self, size: int, part: Component) -> int:
        """Free so many bytes of this rank's device, or as many as a part has, and host memory has room for.

        Returns:
            Bytes that others can have now and could not before.
        """
        assert self.held is not None
        before, freed = self.held(), 0
        while freed < size and part.lend(size - freed, max(0, self.host_available() - HOST_RESERVE)):
            self.trim()  # the allocator keeps a piece of memory as long as anything in it is used
            freed = before - self.held()
        return freed

    def _no_host_room(self, part: Component) -> str:
        """Why a part does not move to host memory. Collective."""
        needed, left = self.most(part.uncopied_bytes), -self.most(-self.host_available())
        limit = memory()
        most = "" if limit.total is None else f" of the {limit.total / GIB:.1f} GiB that {limit.limit or 'there are'}"
        return (
            f" (host memory has {left / GIB:.1f} GiB a rank left{most}{' allows' if limit.limit else ''}, of which "
            f"{HOST_RESERVE / GIB:.0f} stay free: not the {needed / GIB:.1f} GiB that it takes)"
        )

    def fits_host(self, part: Component) -> bool:
        """Whether a part fits into host memory on every rank. Collective."""
        needed = part.uncopied_bytes
        needed += HOST_RESERVE if needed > 0 else 0
        return self.most(needed - self.host_available()) <= 0

    def most(self, value: int) -> int:
        """The largest value of all ranks. Collective."""
        if not self.axis.is_split:
            return value
        all_ranks = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(all_ranks, dist.ReduceOp.MAX, group=self.axis.group)
        return int(all_ranks)


def host_bytes() -> int:
    """This rank's share of the host memory that is available to all of them."""
    return (memory().available or 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
