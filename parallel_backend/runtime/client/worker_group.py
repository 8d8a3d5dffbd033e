"""The client's side of a worker group: starting its ranks, and loading models in them.

Both the ComfyUI nodes and the command line use this. Nothing here knows of either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ...loading.checkpoint import open_checkpoint
from ...loading.content import content_digest
from ..errors import RequestFailedError, WorkersFailedError
from ..group_config import GroupConfig, ModelConfig
from ..patience import mesh_seconds, step_seconds
from ..wire.handshake import Handshakes
from ..wire.messages import Lend, Load, Progress, Unload
from .ranks import POLL_SECONDS, Check, Ranks
from .remote_model import RemoteModel

log = logging.getLogger(__name__)

OnState = Callable[[str, float, float, str], None]
"""Told a state, how far it is, of how much, and what more there is to say."""


class WorkerGroup(Ranks):
    """A group of processes with models in it. Use `acquire_model` rather than making one."""

    def __init__(self, config: GroupConfig, port: int = 0) -> None:
        super().__init__(config, port)
        self.models: dict[ModelConfig, RemoteModel] = {}

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
            ValueError: the port is taken, the endpoint is no address of this host, or a deadline is no number.
        """
        with self.held(check):
            try:
                if self.state == "new":
                    mesh_seconds(), step_seconds()
                    self._launcher.start(imports)
                    self.state = "starting"
                    self._handshakes = Handshakes(self._launcher.listener, self._local)
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
        assert self._handshakes is not None
        told = None
        while len(self._channels) < len(self._local) or not self._others.all_up():
            state = (len(self._channels) + self._others.ranks_up(), self.config.ranks, self._others.wanted())
            if state != told:
                if state[2] and (told is None or told[2] != state[2]):
                    log.warning("%s", state[2])
                on_state("starting", *state)
                told = state
            check()
            for hello, channel in self._handshakes.arrivals(POLL_SECONDS):
                self._channels[hello.rank] = channel
                self._pids[hello.rank] = hello.pid
            trouble = self._others.trouble()
            if trouble is not None:
                raise WorkersFailedError(trouble)
            if not self._launcher.running():
                raise WorkersFailedError(f"the workers did not start: {self._explained(None)}")
        on_state("starting", self.config.ranks, self.config.ranks, "")
        self._handshakes.close()
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
                    source = open_checkpoint(Path(config.path), config.part)
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
            part=config.part,
            **asdict(config.speed),
        )
        began = time.perf_counter()
        with model.advised("transformer"):
            done, _ = self.call(request, {}, check, on_progress)
        model.formats = done[0].data["weight_formats"]
        model.seconds["load"] += time.perf_counter() - began
        model.loaded = True

    def lend(self, size: int, device: str) -> tuple[int, int]:
        """Free so many bytes of a GPU, with the least that helps; the next use brings back what moves for it.

        Args:
            size: bytes.
            device: the GPU, as `Devices.visible` names it.

        Returns:
            Bytes that were freed, and of weights that are left there; 0 where the group is not up, or not on that GPU.
        """
        if device not in self.config.devices.visible:
            return 0, 0
        rank = self._local[self.config.devices.visible.index(device)]
        with self.lock:
            if not self.ready:
                return 0, 0
            try:
                answers, _ = self.call(Lend(self.next_id(), size, [rank]), {})
            except BaseException:
                # Such as Ctrl-C: ranks that are there lend it all the same, and how much is not known.
                for model in self.models.values():
                    model.lent = {component: sum(held.values()) for component, held in model.formats.items()}
                raise
            data = answers[rank].data
            for model in self.models.values():
                model.lent.update(data.get("lent", {}).get(model.name, {}))
            return int(data.get("freed", 0)), int(data.get("left", 0))

    def unload(self, config: ModelConfig) -> None:
        """Free a model; nothing where it is not there."""
        with self.lock:
            model = self.models.pop(config, None)
            if model is not None:
                self.call(Unload(self.next_id(), model.name), {})

    def close(self, state: str = "closed", wait: bool = True) -> None:
        self.models.clear()
        super().close(state, wait)
