"""The client's side of a worker group: its processes, the models in them, and requests to all ranks at once.

Both the ComfyUI nodes and the command line use this. Nothing here knows of either.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from ..loading.checkpoint import open_checkpoint
from ..loading.content import content_digest
from .channel import SEND_SECONDS, Channel, ChannelClosedError, ChannelStuckError
from .deadlines import SILENCE_SECONDS, Owed, Stopped, process_state
from .errors import RequestFailedError, WorkersFailedError
from .failures import FRESH, failure, silence
from .group_config import GroupConfig, ModelConfig
from .launcher import Launcher
from .messages import BadMessageError, Done, Failed, Load, Notice, Predict, Progress, Unload
from .other_hosts import OtherHosts
from .parcel import Buffer, Parcel, pack
from .reception import Reception
from .remote_model import Check, RemoteModel

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STRAGGLER_SECONDS = 2.0
"""How long the other ranks may take to answer after one has failed, before the group is given up."""
FAILURE_SECONDS = 1.5
"""How long torchrun may take to notice that a rank of its host has failed."""

OnState = Callable[[str, float, float, str], None]
"""Told a state, how far it is, of how much, and what more there is to say."""


class WorkerGroup:
    """A group of processes with models in it. Use `acquire_model` rather than making one."""

    def __init__(self, config: GroupConfig, port: int = 0) -> None:
        self.config = config
        self._local = config.hosts.ranks_of(0, config.ranks)
        self.state = "new"
        self.start_seconds = self.import_seconds = 0.0
        """Of starting its ranks, and of waiting for imports meanwhile."""
        self.models: dict[ModelConfig, RemoteModel] = {}
        self.lock = threading.RLock()
        """Held by whoever waits for an answer."""
        self._launcher = Launcher(len(self._local), config.devices, port, config.hosts)
        self._others = OtherHosts(config.hosts, self._launcher.card)
        self._channels: dict[int, Channel] = {}
        self._buffer = Buffer()
        self._pids: dict[int, int] = {}
        self._ids = itertools.count(1)
        self._owed = Owed()
        self._stopped = Stopped()
        self._reception: Reception | None = None
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

    def start(
        self, on_state: OnState = lambda *_: None, check: Check = lambda: None, imports: Sequence[str] = ()
    ) -> None:
        """Start the ranks; nothing where they are up.

        Args:
            on_state: told the state and how far it is: ``("starting", ranks up, ranks, what is missing)`` or
                ``("failed", 0, 1, "")``.
            check: called every 50 ms; may raise to give up waiting. The ranks go on: the next call waits for the rest.
            imports: modules that the ranks are going to need.

        Raises:
            WorkersFailedError: a rank ended, or another host cannot take part or has not joined.
            ValueError: the port is taken, or the endpoint is no address of this host.
        """
        with self.held(check):
            try:
                if self.state == "new":
                    self._launcher.start(imports)
                    self.state = "starting"
                    self._reception = Reception(self._launcher.listener, self._local)
                    self._others.start(self._launcher.address)
                    self._began = time.perf_counter()
                if self.state == "starting":
                    self._receive_ranks(on_state, check)
                    self.start_seconds = time.perf_counter() - self._began
                    self.import_seconds = self._launcher.import_seconds
                    self.state = "ready"
            except (WorkersFailedError, ValueError, OSError):
                self.close(state="failed")
                on_state("failed", 0, 1, "")
                raise

    def _receive_ranks(self, on_state: OnState, check: Check) -> None:
        assert self._reception is not None
        told = None
        while len(self._channels) < len(self._local) or not self._others.all_up():
            state = (len(self._channels) + self._others.ranks_up(), self.config.ranks, self._others.wanted())
            if state != told:
                if state[2] and (told is None or told[2] != state[2]):
                    log.warning("%s", state[2])
                on_state("starting", *state)
                told = state
            check()
            for hello, channel in self._reception.arrivals(POLL_SECONDS):
                self._channels[hello.rank] = channel
                self._pids[hello.rank] = hello.pid
            trouble = self._others.trouble()
            if trouble is not None:
                raise WorkersFailedError(trouble)
            if not self._launcher.running():
                raise WorkersFailedError(f"the workers did not start: {self._launcher.explain(None)}")
        on_state("starting", self.config.ranks, self.config.ranks, "")
        self._reception.close()
        self._launcher.all_connected()

    def load(
        self,
        config: ModelConfig,
        on_state: OnState = lambda *_: None,
        check: Check = lambda: None,
        orphans: Callable[[ModelConfig], bool] = lambda _: False,
    ) -> RemoteModel:
        """A model of the group; it is loaded where it is not there yet.

        Args:
            config: of the model; its devices and ranks are the group's.
            on_state: told ``("loading", bytes on all ranks, of bytes, each rank's percentage)``, and in the end
                ``("ready", 1, 1, seconds of each stage)`` or ``("failed", 0, 1, "")``.
            check: called every 50 ms; may raise to give up waiting. The ranks go on: the next call waits for the rest.
            orphans: whether nobody refers to a model any more, so that it goes first where room is needed.

        Raises:
            WorkersFailedError: a rank ended.
            ValueError: the checkpoint is damaged or does not fit; the models that are there stay.
        """
        assert config.group == self.config
        with self.held(check):
            model = self.models.get(config)
            if model is not None and model.loaded:
                return model
            try:
                if model is None:
                    source = open_checkpoint(Path(config.path))
                    source.check_weights()
                    # Known from when it is asked for: where check() gives up, the ranks load it all the same.
                    model = self.models[config] = RemoteModel(self, config, source, f"m{self.next_id()}")
                self._load(model, on_state, check, [m.name for c, m in list(self.models.items()) if orphans(c)])
            except (ValueError, WorkersFailedError, RequestFailedError):
                self.models.pop(config, None)
                on_state("failed", 0, 1, "")
                raise
            on_state("ready", 1, 1, model.took())
            return model

    def _load(self, model: RemoteModel, on_state: OnState, check: Check, orphans: list[str]) -> None:
        config = model.config
        progress = dict.fromkeys(range(config.layout.world_size), (0, 1))

        def on_progress(message: Progress) -> None:
            progress[message.rank] = (message.done, message.total)
            done, total = (sum(part) for part in zip(*progress.values(), strict=True))
            shares = (f"{100 * part // whole}" for _, (part, whole) in sorted(progress.items()))
            on_state("loading", done, total, f"ranks at {' '.join(shares)} %")

        layout = config.layout
        request = Load(
            self.next_id(),
            model.name,
            config.path,
            layout.ulysses_size,
            layout.ring_size,
            layout.tp_size,
            config.dtype,
            config.fp8,
            config.encoder_memory,
            orphans,
            content_digest(model.source.path) if config.hosts.several else "",
            **asdict(config.speed),
        )
        began = time.perf_counter()
        with model.advised("transformer"):
            self.call(request, {}, check, on_progress)
        model.seconds["load"] += time.perf_counter() - began
        model.loaded = True

    def unload(self, config: ModelConfig) -> None:
        """Free a model; nothing where it is not there."""
        with self.lock:
            model = self.models.pop(config, None)
            if model is not None:
                self.call(Unload(self.next_id(), model.name), {})

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

    def close(self, state: str = "closed", wait: bool = True) -> None:
        """End the group. Safe to call at any time, more than once.

        Args:
            state: what is said of it to those that still use it.
            wait: until its processes are gone; else see `ended`.
        """
        self.state = state
        self._others.close()
        if self._reception is not None:
            self._reception.close()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self.models.clear()
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
            parcel = pack(tensors, self._buffer if isinstance(request, Predict) else None)
            try:
                self._send(request, parcel, check)
            finally:
                parcel.close()
            # Owed from here on: what is refused as too long, or was not sent to all, never is.
            self._owed.sent(request.id, set(range(self.config.ranks)), limit)
            try:
                meanwhile()
                return self._collect(request.id, check, on_progress)
            except BaseException:
                self._buffer = Buffer()  # ranks may still be reading
                raise

    def _send(self, request: Any, parcel: Parcel, check: Check) -> None:
        """Send a request to all ranks, or to none (ValueError: it is too long); else the group ends."""
        sent = False
        try:
            for rank, channel in self._told().items():
                try:
                    channel.send(request, parcel)
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
            if message.rank in range(self.config.ranks):
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

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _failed(self, failures: list[Failed]) -> NoReturn:
        """Raise what ranks failed of; the group goes unless they agree."""
        error, usable = failure(failures, self.config.ranks, self._log_of)
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
        raise WorkersFailedError(f"{self._launcher.explain(rank)}\n{FRESH}")

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
