"""The ranks of a group as its client has them: requests to all at once, and what is done where they do not answer."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from torch import Tensor

from ...planning.lost_gpus import lose
from ..errors import WorkersFailedError
from ..group_config import GroupConfig
from ..wire.channel import SEND_SECONDS, Channel, ChannelClosedError, ChannelStuckError
from ..wire.handshake import Handshakes
from ..wire.messages import BadMessageError, Done, Failed, Notice, Predict, Progress
from ..wire.shared_tensors import Buffer, SharedTensors, pack
from .deadlines import SILENCE_SECONDS, Owed, Stopped, process_state
from .failures import FRESH, failure, silence
from .launcher import Launcher
from .other_hosts import OtherHosts

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STRAGGLER_SECONDS = 2.0
"""How long the other ranks may take to answer after one has failed, before the group is given up."""
FAILURE_SECONDS = 1.5
"""How long torchrun may take to notice that a rank of its host has failed."""

Check = Callable[[], None]
"""Called every 50 ms while somebody waits; may raise to give up."""


class Ranks:
    """The processes of a group. `WorkerGroup` starts them, and has models in them.

    Args:
        config: of the group.
        port: see `Launcher`.
    """

    def __init__(self, config: GroupConfig, port: int = 0) -> None:
        self.config = config
        self.state = "new"
        self.start_seconds = self.import_seconds = 0.0
        """Of starting the ranks, and of waiting for imports meanwhile."""
        self.lock = threading.RLock()
        """Held by whoever waits for an answer."""
        self._local = config.hosts.ranks_of(0, config.ranks)
        self._launcher = Launcher(len(self._local), config.devices, port, config.hosts)
        self._others = OtherHosts(config.hosts, self._launcher.card)
        self._channels: dict[int, Channel] = {}
        self._pids: dict[int, int] = {}
        self._handshakes: Handshakes | None = None
        self._buffer = Buffer()
        self._ids = itertools.count(1)
        self._owed = Owed()
        self._stopped = Stopped()
        self._ending: threading.Thread | None = None

    @property
    def ready(self) -> bool:
        """Whether requests can be sent."""
        return self.state == "ready" and self.usable

    @property
    def usable(self) -> bool:
        """Whether requests can be sent, or will be once its ranks are up."""
        return self.state in ("starting", "ready") and self._launcher.running() and not self._others.broken()

    def next_id(self) -> int:
        """A number for a request or a name, used once."""
        return next(self._ids)

    @contextlib.contextmanager
    def held(self, check: Check) -> Iterator[None]:
        """Hold the lock; ``check`` is called while somebody else has it, and may raise to give up."""
        while not self.lock.acquire(timeout=POLL_SECONDS):
            check()
        try:
            yield
        finally:
            self.lock.release()

    def post(self, request: Any) -> None:
        """Send a request to every rank, and neither wait for answers nor ever raise.

        Requests are carried out in order, and answers that nobody waits for are dropped.
        """
        for channel in list(self._told().values()):
            with suppress(ChannelClosedError):  # a rank that is gone keeps nothing; the next request says so
                channel.send(request)
        self._owed.sent(request.id, set(range(self.config.ranks)), SILENCE_SECONDS)

    def _told(self) -> dict[int, Channel]:
        """The ranks that requests are sent to: over several hosts, rank 0 passes them on."""
        return {0: self._channels[0]} if self.config.hosts.several and self._channels else self._channels

    def call(
        self,
        request: Any,
        tensors: Mapping[str, Tensor],
        check: Check = lambda: None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        limit: float | None = SILENCE_SECONDS,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[list[Done], dict[str, Tensor]]:
        """Send a request to every rank and wait for every answer: the answers in rank order, and rank 0's tensors.

        Args:
            request: what to do.
            tensors: go along with it.
            check: called every 50 ms; may raise to give up waiting. The ranks go on.
            on_progress: told what ranks report meanwhile.
            limit: seconds without a word from the ranks after which they count as hung; None: any time is fine.
            meanwhile: called once the request is sent.

        Raises:
            ValueError: the request was at fault.
            RequestFailedError: all ranks failed at the same place.
            WorkersFailedError: the group is gone.
        """
        with self.held(check):
            if not self._channels:
                raise WorkersFailedError(f"the worker group is {self.state}")
            # What else is sent may stay with the ranks as it is.
            shared = pack(tensors, self._buffer if isinstance(request, Predict) else None)
            try:
                self._send(request, shared, check)
            finally:
                shared.close()
            # Owed from here on: what is refused as too long, or was not sent to all, never is.
            self._owed.sent(request.id, set(range(self.config.ranks)), limit)
            try:
                meanwhile()
                return self._collect(request.id, check, on_progress)
            except BaseException:
                self._buffer = Buffer()  # ranks may still be reading
                raise

    def _send(self, request: Any, shared: SharedTensors, check: Check) -> None:
        """Send a request to all ranks, or to none (ValueError: it is too long); else the group ends."""
        sent = False
        try:
            for rank, channel in self._told().items():
                try:
                    channel.send(request, shared)
                    sent = True
                except ChannelStuckError:
                    self._hung({rank}, SEND_SECONDS)
                except ChannelClosedError:
                    self._lost(rank, check)
        except BaseException:
            if sent and self.state != "failed":  # such as Ctrl-C in a script: some ranks would wait for the others
                self.close(state="failed", wait=False)
            raise

    def _collect(
        self, request_id: int, check: Check, on_progress: Callable[[Progress], None]
    ) -> tuple[list[Done], dict[str, Tensor]]:
        answers: dict[int, Done | Failed] = {}
        tensors: dict[str, Tensor] = {}
        deadline: float | None = None

        def progressed(message: Progress) -> None:
            self._owed.progressed()
            if message.total and message.rank in range(self.config.ranks):
                on_progress(message)

        with selectors.DefaultSelector() as selector:
            for rank, channel in self._channels.items():
                selector.register(channel, selectors.EVENT_READ, rank)
            while len(answers) < self.config.ranks:
                # What has arrived is read before anybody is judged by the clock, which is read before that.
                now = time.monotonic()
                arriving = selector.select(POLL_SECONDS)
                for key, _ in arriving:
                    try:
                        message, arrived = self._channels[key.data].receive()
                    except ChannelClosedError:
                        self._lost(key.data, check)
                    except BadMessageError as error:
                        self._end(f"rank {key.data} sent what is no message: {error}", key.data)
                    if isinstance(message, Progress):
                        progressed(message)
                    elif isinstance(message, Notice):
                        log.info("workers: %s", message.text)
                    elif isinstance(message, (Done, Failed)) and message.rank in range(self.config.ranks):
                        self._owed.answered(message.id, message.rank)
                        if message.id == request_id:  # others were given up, and their answers are dropped
                            answers[message.rank] = message
                            tensors.update(arrived)
                    else:
                        self._end(f"rank {key.data} sent a {type(message).__name__} out of turn", key.data)
                for news in self._others.news():
                    if isinstance(news, Progress):
                        progressed(news)
                    elif news.id == request_id and news.rank in range(self.config.ranks):
                        answers.setdefault(news.rank, news)
                trouble = self._others.trouble()
                if trouble is not None:
                    self._end(trouble)
                check()
                if deadline is None and any(isinstance(a, Failed) and not a.alone for a in answers.values()):
                    deadline = time.monotonic() + (self._others.patience or STRAGGLER_SECONDS)
                if arriving:
                    continue
                if deadline is not None and now > deadline and not self._others.in_doubt():
                    break
                overdue = self._owed.overdue(now) or self._stopped.overdue(self._pids)
                if overdue is not None:
                    self._hung(*overdue)
        failures = [answer for answer in answers.values() if isinstance(answer, Failed)]
        if not failures:
            return [answer for _, answer in sorted(answers.items()) if isinstance(answer, Done)], tensors
        self._failed(failures)

    def close(self, state: str = "closed", wait: bool = True) -> None:
        """End the group. Safe to call at any time, more than once.

        Args:
            state: what is said of it to those that still use it.
            wait: until its processes are gone; else see `ended`.
        """
        self.state = state
        self._others.close()
        if self._handshakes is not None:
            self._handshakes.close()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        if wait:
            self.ended(float("inf"))
            self._launcher.stop()
        elif self._ending is None:
            self._ending = threading.Thread(target=self._launcher.stop, name="end of a worker group", daemon=True)
            self._ending.start()

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether a closed group's processes are gone; waits so long for it."""
        if self._ending is not None:
            self._ending.join(min(seconds, threading.TIMEOUT_MAX))
        return self._ending is None or not self._ending.is_alive()

    def forget(self) -> None:
        """Close what a forked child has of this, and leave the processes alone."""
        self.state = "another process's"
        self._others.close()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._launcher.forget()

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _failed(self, failures: list[Failed]) -> NoReturn:
        """Raise what ranks failed of; the group goes unless they agree."""
        for failed in failures:
            if failed.device_failed:
                self._note_lost(failed.rank, failed.error)
        error, usable = failure(failures, self.config.ranks, self._log_of, self.config.hosts.several)
        if not usable:
            self.close(state="failed", wait=False)
        raise error

    def _lost(self, rank: int, check: Check) -> NoReturn:
        """A rank's connection is closed: it has ended."""
        if self.config.hosts.several and self._launcher.first_to_fail(FAILURE_SECONDS) is None:
            trouble = self._others.verdict(check)
            if trouble is not None:
                self._end(trouble)
        self.close(state="failed", wait=False)
        self.ended(3.0)  # then torchrun has said how
        raise WorkersFailedError(f"{self._explained(rank)}\n{FRESH}")

    def _explained(self, rank: int | None) -> str:
        """Why a rank ended; one that CUDA fails on its GPU before it can say so ends, too."""
        text = self._launcher.explain(rank)
        first = self._launcher.first_to_fail()
        rank = first[0] if first else rank
        if rank is not None:
            self._note_lost(rank, text)
        return text

    def _note_lost(self, rank: int, error: str) -> None:
        """CUDA failed on the GPU of a rank: whether ``auto`` is to leave it out."""
        if rank in self._local and self.config.devices.kind == "cuda":
            lose(self.config.devices.visible[rank - self._local[0]], error)

    def _hung(self, ranks: set[int], limit: float) -> NoReturn:
        """Ranks have not answered in time. Those that can still do so write to their logs where they are."""
        states = {rank: process_state(pid) for rank, pid in self._pids.items() if rank in ranks}
        for rank, state in states.items():
            if state != "T":
                with suppress(ProcessLookupError):
                    os.kill(self._pids[rank], signal.SIGUSR1)
        time.sleep(0.2)
        self._end(*silence(ranks, states, limit))

    def _end(self, text: str, rank: int | None = None) -> NoReturn:
        """End the group and raise; a rank's log is named."""
        self.close(state="failed", wait=False)
        log_of = "" if rank is None else f"\n(log: {self._log_of(rank)})"
        raise WorkersFailedError(f"{text}{log_of}\n{FRESH}")

    def _log_of(self, rank: int) -> str:
        return self._others.log_of(rank) or str(self._launcher.log_of(rank))
