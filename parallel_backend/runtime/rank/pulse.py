"""A rank's pulse: while it is busy with what may take any time, it says every few seconds that it gets on, if it does.

What counts: blocks that were computed (`parallel.signs`), work of the CPU where that is the device, and work of the
compiler. A CPU that waits for a GPU is as busy as one that computes, so its time counts for nothing else there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ...parallel import signs

COMPILE_SECONDS = 1800.0
"""Most that compiling counts as getting on in one request."""
BUSY = 0.03
"""Share of a core that a process has at least that gets on; one that waits has next to none."""
_COMPILER = tuple(os.sep + os.path.join(*path) + os.sep for path in (["torch", "_dynamo"], ["torch", "_inductor"]))
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Pulse:
    """Looks at this process in a thread of its own, while a request is `watched`.

    Args:
        seconds: between two looks.
        on_cpu: whether this rank's device is the CPU.
        tell: called after a look that showed progress.
        clock: seconds.
    """

    def __init__(
        self, seconds: float, on_cpu: bool, tell: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self.on_cpu, self.tell, self._clock = seconds, on_cpu, tell, clock
        self._main = threading.get_ident()
        self._watching = threading.Event()
        self._signs, self._worked, self._looked, self._compiled = 0, 0.0, 0.0, 0.0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watched(self, wanted: bool):
        """A request is carried out meanwhile, which may take any time."""
        if not wanted:
            yield
            return
        signs.watch(True)
        self._signs, self._worked, self._looked, self._compiled = signs.count(), cpu_seconds(), self._clock(), 0.0
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
            self._thread.start()
        self._watching.set()
        try:
            yield
        finally:
            self._watching.clear()
            signs.watch(False)

    def _run(self) -> None:
        while self._watching.wait():
            time.sleep(self.seconds)
            with contextlib.suppress(Exception):  # such as of a GPU that is gone: then there is no pulse
                if self._watching.is_set() and self.beats():
                    self.tell()

    def beats(self) -> bool:
        """Whether anything got on since the last look."""
        given, now = signs.count(), self._clock()
        since, got_on = now - self._looked, given != self._signs
        compiling = _in_compiler(sys._current_frames().get(self._main))
        if self.on_cpu or compiling:
            worked = cpu_seconds()
            busy = worked - self._worked > BUSY * since
            self._worked = worked
            if compiling:
                self._compiled += since
            got_on |= busy and (not compiling or self._compiled <= COMPILE_SECONDS)
        self._signs, self._looked = given, now
        return got_on


def _in_compiler(frame: FrameType | None) -> bool:
    """Whether a stack is in PyTorch's compiler."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _COMPILER):
            return True
        frame = frame.f_back
    return False


def cpu_seconds() -> float:
    """Seconds that this process and those that it started have worked, as far as they can be seen."""
    return sum(map(_seconds_of, _family(os.getpid())))


def _family(pid: int) -> set[int]:
    found, new = set(), {pid}
    while new:
        one = new.pop()
        found.add(one)
        for file in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError, ValueError):
                new |= set(map(int, file.read_text().split())) - found
    return found


def _seconds_of(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS  # its own, and of those that it waited for
    return 0.0
