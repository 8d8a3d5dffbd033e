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
        available: bytes that could be allocated on the device now, and bytes of host memory for this rank.
        notify: told what users should know.
    """

    def __init__(
        self,
        device: torch.device,
        axis: Axis,
        notify: Callable[[str], None],
        available: Callable[[], int] | None = None,
        host_available: Callable[[], int] | None = None,
    ) -> None:
        self.device, self.axis, self.notify = device, axis, notify
        self.host_available = host_available or host_bytes
        self.available = available or (self._device_bytes if device.type == "cuda" else self.host_available)

    def _device_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        # What torch has set aside and does not use is as good as free, but for what a CUDA graph uses.
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + max(0, unused - graphs.held_bytes())

    def least_available(self) -> int:
        """Bytes available on the fullest device. Collective."""
        return -self._most(-self.available())

    def has(self, size: int) -> bool:
        """Whether every rank has so many of its own bytes available. Collective."""
        return self._most(size - self.available()) <= 0

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
        missing = self._most(weights - self.available())
        if missing > 0:
            needed = self._most(weights)
            raise ValueError(
                f"{what} needs {needed / GIB:.1f} GiB on each device, {missing / GIB:.1f} GiB more than can be made "
                "free on the fullest one; take a larger TP degree or more devices, or end other programs on them"
            )
        return max(0, self._most(weights + workspace - self.available()))

    def leave(self, part: Component, why: str, for_good: bool = False) -> None:
        """Free a part's memory on the device: it moves to host memory, or is read again later. Collective.

        On the CPU there is no other memory to move to. ``for_good`` says that it is not expected back.
        """
        size = self._most(part.nbytes)
        where = f"{size / GIB:.1f} GiB a rank of the {part.label}"
        keep = not for_good and self.device.type == "cuda" and self.fits_host(part)
        if keep:
            part.to_host()
            self.notify(f"{where} moved to host memory {why}")
        else:
            part.drop()
            self.notify(f"{where} unloaded {why}" + ("" if for_good else "; the next use reads it again"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fits_host(self, part: Component) -> bool:
        """Whether a part fits into host memory on every rank. Collective."""
        needed = 0 if part.host is not None else part.nbytes + HOST_RESERVE
        return self._most(needed - self.host_available()) <= 0

    def _most(self, value: int) -> int:
        """The largest value of all ranks."""
        if not self.axis.is_split:
            return value
        all_ranks = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(all_ranks, dist.ReduceOp.MAX, group=self.axis.group)
        return int(all_ranks)


def host_bytes() -> int:
    """This rank's share of the host memory that is available to all of them."""
    return (memory().available or 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
