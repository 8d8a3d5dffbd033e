"""The client's side of a worker group: its processes, the models in them, and requests to all ranks at once.

Both the ComfyUI nodes and the command line use this. Nothing here knows of either.
"""

from __future__ import annotations

import itertools
import logging
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..loading.checkpoint import open_checkpoint
from .channel import Channel, ChannelClosedError, pack
from .group_config import GroupConfig, ModelConfig
from .launcher import Launcher
from .messages import Done, Failed, Hello, Load, Notice, Progress, Unload
from .remote_model import Check, RemoteModel

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
STRAGGLER_SECONDS = 5.0
"""How long the other ranks may take to answer after one has failed, before the group is given up."""

OnState = Callable[[str, float, float, str], None]
"""Told a state, how far it is, of how much, and what more there is to say."""


class WorkersFailedError(RuntimeError):
    """The group is gone; the next use starts a fresh one."""


class WorkerGroup:
    """A group of processes with models in it. Use `acquire_model` rather than making one."""

    def __init__(self, config: GroupConfig, port: int = 0) -> None:
        self.config = config
        self.state = "starting"
        self.start_seconds = 0.0
        self.models: dict[ModelConfig, RemoteModel] = {}
        self.lock = threading.RLock()
        """Held by whoever waits for an answer."""
        self._launcher = Launcher(config.ranks, config.devices, port)
        self._channels: dict[int, Channel] = {}
        self._pids: dict[int, int] = {}
        self._ids = itertools.count(1)

    @property
    def ready(self) -> bool:
        """Whether requests can be sent."""
        return self.state == "ready" and self._launcher.running()

    def next_id(self) -> int:
        """A number for a request or a name, used once."""
        return next(self._ids)

    def start(self, on_state: OnState = lambda *_: None, check: Check = lambda: None) -> None:
        """Start the ranks.

        Args:
            on_state: told the state and how far it is: ``("starting", ranks up, ranks, "")`` or
                ``("failed", 0, 1, "")``.
            check: called every 50 ms; may raise to give up, which ends the processes.

        Raises:
            WorkersFailedError: a rank ended.
        """
        with self.lock:
            try:
                began = time.perf_counter()
                self._launcher.start()
                self._accept(on_state, check)
                self.start_seconds = time.perf_counter() - began
                self.state = "ready"
            except BaseException:
                self.close(state="failed")
                on_state("failed", 0, 1, "")
                raise

    def _accept(self, on_state: OnState, check: Check) -> None:
        ranks = self.config.ranks
        self._launcher.listener.settimeout(POLL_SECONDS)
        on_state("starting", 0, ranks, "")
        while len(self._channels) < ranks:
            check()
            try:
                connection, _ = self._launcher.listener.accept()
            except TimeoutError:
                if not self._launcher.running():
                    raise WorkersFailedError(f"the workers did not start: {self._launcher.explain(None)}") from None
                continue
            connection.setblocking(True)
            channel = Channel(connection)
            hello, _ = channel.receive()
            if not isinstance(hello, Hello):
                raise WorkersFailedError(f"a worker began with {type(hello).__name__} instead of Hello")
            self._channels[hello.rank] = channel
            self._pids[hello.rank] = hello.pid
            on_state("starting", len(self._channels), ranks, "")
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
                ``("ready", 1, 1, "")`` or ``("failed", 0, 1, "")``.
            check: called every 50 ms; may raise to give up waiting. The ranks go on: the next call waits for the rest.
            orphans: whether nobody refers to a model any more, so that it goes first where room is needed.

        Raises:
            WorkersFailedError: a rank ended.
            ValueError: the checkpoint is damaged or does not fit; the models that are there stay.
        """
        assert config.group == self.config
        with self.lock:
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
            except (ValueError, RuntimeError):
                self.models.pop(config, None)
                on_state("failed", 0, 1, "")
                raise
            on_state("ready", 1, 1, "")
            return model

    def _load(self, model: RemoteModel, on_state: OnState, check: Check, orphans: list[str]) -> None:
        config = model.config
        progress = dict.fromkeys(self._channels, (0, 1))

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
        )
        began = time.perf_counter()
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
        for channel in list(self._channels.values()):
            with suppress(ChannelClosedError):  # a rank that is gone keeps nothing; the next request says so
                channel.send(request)

    def close(self, state: str = "closed") -> None:
        """End the group. Safe to call at any time, more than once."""
        self.state = state
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self.models.clear()
        self._launcher.stop(list(self._pids.values()))

    def call(
        self,
        request: Any,
        tensors: Mapping[str, Tensor],
        check: Check = lambda: None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[list[Done], dict[str, Tensor]]:
        """Send a request to every rank and wait for every answer: the answers in rank order, and rank 0's tensors."""
        with self.lock:
            if not self._channels:
                raise WorkersFailedError(f"the worker group is {self.state}")
            parcel = pack(tensors)
            try:
                for rank, channel in self._channels.items():
                    try:
                        channel.send(request, parcel)
                    except ChannelClosedError:
                        raise self._give_up(rank) from None
            finally:
                parcel.close()
            return self._collect(request.id, check, on_progress)

    def _collect(
        self, request_id: int, check: Check, on_progress: Callable[[Progress], None]
    ) -> tuple[list[Done], dict[str, Tensor]]:
        answers: dict[int, Done | Failed] = {}
        tensors: dict[str, Tensor] = {}
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            for rank, channel in self._channels.items():
                selector.register(channel, selectors.EVENT_READ, rank)
            while len(answers) < len(self._channels):
                for key, _ in selector.select(POLL_SECONDS):
                    try:
                        message, arrived = self._channels[key.data].receive()
                    except ChannelClosedError:
                        raise self._give_up(key.data) from None
                    if isinstance(message, Progress):
                        on_progress(message)
                    elif isinstance(message, Notice):
                        log.info("workers: %s", message.text)
                    elif isinstance(message, (Done, Failed)) and message.id == request_id:
                        # Answers to a request that was given up are dropped.
                        answers[message.rank] = message
                        tensors.update(arrived)
                if deadline is None and any(isinstance(answer, Failed) for answer in answers.values()):
                    deadline = time.monotonic() + STRAGGLER_SECONDS
                if deadline is not None and time.monotonic() > deadline:
                    break
                check()
        failures = [answer for answer in answers.values() if isinstance(answer, Failed)]
        if not failures:
            return [answer for _, answer in sorted(answers.items()) if isinstance(answer, Done)], tensors
        first = failures[0]
        if len(failures) < len(self._channels):
            # Some ranks went on without the failed one: nobody can say any more where each of them is.
            self.close(state="failed")
            raise WorkersFailedError(f"rank {first.rank} failed: {first.error}\n{first.traceback}")
        if first.bad_input:
            raise ValueError(first.error)
        raise RuntimeError(f"rank {first.rank} failed: {first.error}\n{first.traceback}")

    def _give_up(self, rank: int) -> WorkersFailedError:
        explanation = self._launcher.explain(rank)
        self.close(state="failed")
        return WorkersFailedError(f"{explanation}\nThe other workers were stopped; the next run starts a fresh group.")
