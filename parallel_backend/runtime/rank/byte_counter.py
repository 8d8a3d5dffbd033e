"""How much of a model has arrived, told now and then."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


class ByteCounter:
    """Counts the bytes of a model as they arrive, and tells of it now and then."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self.total, self.on_progress, self.done = max(1, total), on_progress, 0

    def add(self, new: int) -> None:
        step = max(1, self.total // 50)
        self.done += new
        if (self.done - new) // step != self.done // step:
            self.on_progress(self.done, self.total)

    def finish(self) -> None:
        self.on_progress(self.total, self.total)
