"""Waiting for the end of processes that are not our children, by their pidfds: no polling, no mistaken identity."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable


class Watched:
    """Processes that are alive now. Open it before what should end them."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.descriptors = {pid: os.pidfd_open(pid) for pid in pids}

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def alive_after(self, seconds: float) -> list[int]:
        """Wait until all have ended, for so long at most; those that have not."""
        deadline = time.monotonic() + seconds
        alive = dict(self.descriptors)
        while alive and time.monotonic() < deadline:
            poll = select.poll()
            for descriptor in alive.values():
                poll.register(descriptor, select.POLLIN)
            ended = {descriptor for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
            alive = {pid: descriptor for pid, descriptor in alive.items() if descriptor not in ended}
        return sorted(alive)
