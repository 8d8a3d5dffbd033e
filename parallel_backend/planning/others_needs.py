"""What others on a GPU really take of the memory that they ask for: they ask by estimates, which are often high.

A program that asks for memory states what it wants to have free. How little was free in the end is seen while it works,
by the device's own count, in which memory shows that a caching allocator of any kind has taken, and so longer than it
is looked for. The next time that as much is asked for, what was taken then is enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MARGIN_BYTES = 256 * 2**20
MARGIN = 1.1
"""What was taken, times this and with `MARGIN_BYTES`, is what is needed: allocators fragment."""
LESS, MORE = 0.9, 1.02
"""A request of so many times another is the same one: a model that is there already is not asked for again, and what is
free is counted a little later each time."""
LOOK_SECONDS = 0.01
WATCH_SECONDS = 1800.0
"""After so long nothing is learned: nobody knows what goes on."""
KEPT = 64
"""Requests that are known; the one that was made first goes first."""


class OthersNeeds:
    """What others took of one device, by what they had asked for.

    Args:
        free: bytes of the device that nobody has taken now.
        look_seconds: how often that is looked at.
    """

    def __init__(self, free: Callable[[], int], look_seconds: float = LOOK_SECONDS) -> None:
        self._free, self._look_seconds = free, look_seconds
        self._taken: dict[int, int] = {}
        """Bytes that were to be free -> the most that was ever taken then."""
        self._lock = threading.Lock()
        self._watch: _Watch | None = None

    def to_give(self, asked: int, free: int) -> int:
        """How many of the bytes that somebody asks for are needed, as far as is known.

        Args:
            asked: bytes that should become free.
            free: that are free already, by the count of who asks.
        """
        with self._lock:
            taken = self._known(asked + free)
        if taken is None:
            return asked
        return min(asked, max(0, round(taken * MARGIN) + MARGIN_BYTES - free))

    def given(self, required: int, freed: int, free: int) -> None:
        """Somebody who wants so many bytes to be free was given some; what is taken is looked at until `finish`.

        Args:
            required: bytes that were to be free.
            freed: bytes that were given.
            free: that are free now, with these, by the count of who asks.
        """
        with self._lock:
            if self._watch is None:
                self._watch = _Watch(self._free, self._look_seconds, free)
            else:
                self._watch.start += freed  # it goes on with what it has, and with that
            self._watch.requests.append(required)

    def finish(self) -> bool:
        """The memory is ours again: what was taken is known. Cheap where there is nothing to finish.

        Returns:
            Whether something was given since the last time.
        """
        if self._watch is None:
            return False
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is None:
            return False
        if (least := watch.stop()) is None:
            return True
        with self._lock:
            for required in watch.requests:
                # Who has taken all might have taken more.
                taken = watch.start - least if least > MARGIN_BYTES // 4 else required
                known = self._known(required)
                self._taken[required] = max(taken, known or 0)
            for first in list(self._taken)[:-KEPT]:
                del self._taken[first]
        return True

    def _known(self, required: int) -> int | None:
        near = [taken for other, taken in self._taken.items() if LESS * other <= required <= MORE * other]
        return max(near, default=None)


class _Watch:
    """How little was free at any time. ``start``: what was free at first, and was given since."""

    def __init__(self, free: Callable[[], int], look_seconds: float, start: int) -> None:
        self.start, self.requests = start, list[int]()
        self._free, self._look_seconds = free, look_seconds
        self._least: int | None = free()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory that others take", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        until = time.monotonic() + WATCH_SECONDS
        while not self._over.wait(self._look_seconds):
            try:
                found = self._free()
            except RuntimeError:  # of CUDA: whoever uses the device says what is wrong
                self._least = None
                return
            if self._least is None or time.monotonic() > until:
                self._least = None
                return
            self._least = min(self._least, found)

    def stop(self) -> int | None:
        """The least that was free; None: not known."""
        self._over.set()
        self._thread.join()
        if self._least is not None:
            self._least = min(self._least, self._free())
        return self._least
