"""When the ranks of a group count as hung: which requests they owe an answer to, and how long each may take."""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ..patience import step_seconds

TIMES_MEDIAN = 20
SILENCE_SECONDS = 600.0
"""How long the ranks may show no sign of getting on while they load, encode or decode."""
CHECK_SECONDS = 1.0
GAP_SECONDS = 5.0
"""Where nobody looked at processes for so long, nothing is known of the time between."""
KEPT_SHAPES = 32
KEPT_STEPS = 50


class StepTimes:
    """What steps of each shape took, and so what the next one may take."""

    def __init__(self) -> None:
        self._seconds: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def add(self, shape: Hashable, seconds: float) -> None:
        """Note a computed step. Cached ones would make computed ones look slow."""
        self._seconds.setdefault(shape, deque(maxlen=KEPT_STEPS)).append(seconds)
        self._seconds.move_to_end(shape)
        if len(self._seconds) > KEPT_SHAPES:
            self._seconds.popitem(last=False)

    def is_first(self, shape: Hashable) -> bool:
        """Whether no step of a shape is known, so that the next one may take any time as long as it gets on."""
        return shape not in self._seconds

    def limit(self, shape: Hashable) -> float | None:
        """Seconds that a step may take, or the first one of its shape without a sign of getting on; None: any time."""
        least = step_seconds()
        if not least:
            return None
        if self.is_first(shape):
            return least
        return max(least, TIMES_MEDIAN * statistics.median(self._seconds[shape]))


@dataclass
class _Request:
    limit: float | None
    waiting: set[int] = field(default_factory=set)


class Owed:
    """The requests that ranks have not answered yet, in order. The first one's time runs from when it became the first.

    A request may wait behind one that nobody waits for any more, such as a step that was cancelled.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._since = clock()

    def sent(self, request: int, ranks: set[int], limit: float | None) -> None:
        """A request was sent; ``limit`` is in seconds, None: it may take as long as it wants."""
        if not self._requests:
            self._since = self._clock()
        self._requests[request] = _Request(limit, ranks)

    def answered(self, request: int, rank: int) -> None:
        """A rank is done with a request."""
        if request not in self._requests:
            return
        self._requests[request].waiting.discard(rank)
        while self._requests and not next(iter(self._requests.values())).waiting:
            self._requests.popitem(last=False)
            self._since = self._clock()

    def progressed(self) -> None:
        """A rank showed that it is at work: the first request's time begins anew."""
        self._since = self._clock()

    def overdue(self, now: float | None = None) -> tuple[set[int], float] | None:
        """The ranks that have not answered in time, and how many seconds that was; None where all is well.

        Args:
            now: by the clock, when everything that had arrived was read; None: just now.
        """
        if not self._requests:
            return None
        first = next(iter(self._requests.values()))
        if first.limit is None or (self._clock() if now is None else now) - self._since <= first.limit:
            return None
        return first.waiting, first.limit


class Stopped:
    """Processes that somebody has stopped (SIGSTOP, a debugger), and since when: they answer to nothing.

    Args:
        clock: seconds.
        state: of a process, as /proc has it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, state: Callable[[int], str] | None = None) -> None:
        self._clock, self._state = clock, state or process_state
        self._since: dict[int, float] = {}
        self._looked = -CHECK_SECONDS

    def overdue(self, pids: Mapping[int, int]) -> tuple[set[int], float] | None:
        """The ranks that have been stopped for as long as a step may take at least, and how long that is.

        Args:
            pids: of the ranks on this machine. It is looked at once a second, however often this is called.
        """
        least, now = step_seconds(), self._clock()
        if not least or now - self._looked < CHECK_SECONDS:
            return None
        if now - self._looked > GAP_SECONDS:
            self._since.clear()
        self._looked = now
        stopped = {rank for rank, pid in pids.items() if self._state(pid) == "T"}
        self._since = {rank: self._since.get(rank, self._looked) for rank in stopped}
        overdue = {rank for rank, since in self._since.items() if self._looked - since >= least}
        return (overdue, least) if overdue else None


def process_state(pid: int) -> str:
    """The letter that the system has for a process's state, such as T for a stopped one; none for one that is gone."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
    return ""
