"""The client's side of a worker group: start it, load a checkpoint into it, and have it encode, predict and decode.

Both the ComfyUI nodes and the command line use this. Nothing here knows of either.
"""

from __future__ import annotations

import itertools
import selectors
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cache.decision import Decision, Evaluation
from ..cache.run import CacheRun
from ..loading.checkpoint import Checkpoint, open_checkpoint
from .channel import Channel, ChannelClosedError, pack
from .group_config import GroupConfig
from .launcher import Launcher
from .messages import (
    DecodeLatent,
    Done,
    EncodeImage,
    EncodeText,
    EndRun,
    Failed,
    Hello,
    Keep,
    Load,
    Predict,
    Progress,
    Stats,
)
from .report import make_report

POLL_SECONDS = 0.05
KEPT_TENSORS = 16
"""Conditioning tensors (contexts, references) that stay with the workers; the least recently used goes first."""
KEPT_TIMINGS = 10_000
"""Timings of each kind that a group remembers for its report."""
STRAGGLER_SECONDS = 5.0
"""How long the other ranks may take to answer after one has failed, before the group is given up."""

Check = Callable[[], None]
OnState = Callable[[str, float, float, str], None]
"""Told a state, how far it is, of how much, and what more there is to say."""


class WorkersFailedError(RuntimeError):
    """The group is gone; the next use starts a fresh one."""


class WorkerGroup:
    """A started group with one checkpoint in it. Use `acquire_group` rather than making one."""

    def __init__(self, config: GroupConfig, port: int = 0) -> None:
        self.config = config
        self.source: Checkpoint = open_checkpoint(Path(config.path))
        self.state = "starting"
        self.seconds: dict[str, Any] = {"start": 0.0, "load": 0.0}
        self.reset_timings()
        self.last_run: CacheRun | None = None
        self._launcher = Launcher(config.layout.world_size, config.devices, port)
        self._channels: dict[int, Channel] = {}
        self._pids: dict[int, int] = {}
        self._ids = itertools.count(1)
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.RLock()

    @property
    def ready(self) -> bool:
        """Whether requests can be sent."""
        return self.state == "ready" and self._launcher.running()

    def start(self, on_state: OnState = lambda *_: None, check: Check = lambda: None) -> None:
        """Start the ranks and load the checkpoint.

        Args:
            on_state: told the state and how far it is: ``("starting", ranks up, ranks, "")``, ``("loading", bytes
                on all ranks, of bytes, each rank's percentage)``, ``("ready", 1, 1, "")`` or ``("failed", 0, 1, "")``.
            check: called every 50 ms; may raise to give up.

        Raises:
            WorkersFailedError: a rank ended.
            ValueError: the checkpoint does not fit its configuration.
        """
        with self._lock:
            self.source.check_weights()
            try:
                began = time.perf_counter()
                self._launcher.start()
                self._accept(on_state, check)
                self.seconds["start"] = time.perf_counter() - began
                self._load(on_state, check)
            except BaseException:
                self.close(state="failed")
                on_state("failed", 0, 1, "")
                raise
            on_state("ready", 1, 1, "")

    def _accept(self, on_state: OnState, check: Check) -> None:
        ranks = self.config.layout.world_size
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

    def _load(self, on_state: OnState, check: Check) -> None:
        layout = self.config.layout
        self.state = "loading"
        progress = dict.fromkeys(self._channels, (0, 1))

        def on_progress(message: Progress) -> None:
            progress[message.rank] = (message.done, message.total)
            done, total = (sum(part) for part in zip(*progress.values(), strict=True))
            shares = (f"{100 * part // whole}" for _, (part, whole) in sorted(progress.items()))
            on_state("loading", done, total, f"ranks at {' '.join(shares)} %")

        request = Load(
            next(self._ids),
            self.config.path,
            layout.ulysses_size,
            layout.ring_size,
            layout.tp_size,
            self.config.dtype,
            self.config.keep_fp8,
        )
        began = time.perf_counter()
        self._call(request, {}, check, on_progress)
        self.seconds["load"] = time.perf_counter() - began
        self.state = "ready"

    def encode_text(self, ids: Tensor, mask: Tensor, check: Check = lambda: None) -> Tensor:
        """Context ``[B, L, C]`` from token ids and mask ``[B, L]`` (int64)."""
        with self._timed("text"):
            return self._call(EncodeText(next(self._ids)), {"ids": ids, "mask": mask}, check)[1]["context"]

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        guidance: Tensor | None = None,
        references: Sequence[Tensor] = (),
        check: Check = lambda: None,
        cache: tuple[CacheRun, Evaluation] | None = None,
    ) -> Tensor:
        """One evaluation of the transformer.

        Args:
            x: latent ``[B, C, H, W]``.
            timestep: sigma in 0..1, ``[B]``.
            context: ``[B, L, C]``; sent when it is new, named afterwards.
            guidance: ``[B]`` or None.
            references: reference latents ``[1 or B, C, h, w]``; sent when new, named afterwards.
            check: called every 50 ms; may raise to give the step up. The group stays usable.
            cache: has the workers use the block cache: a run, which notes what is decided, and its evaluation. Call
                `end_run` when the run is over.

        Returns:
            The prediction ``[B, C, H, W]``, in the model's dtype, on the CPU.
        """
        with self._timed("steps"):
            names: list[str] = []
            for tensor in (context, *references):
                names.append(self._name(tensor, names, check))
            tensors = {"x": x, "timestep": timestep}
            if guidance is not None:
                tensors["guidance"] = guidance
            plan = None
            if cache is not None:
                run, evaluation = cache
                plan = {"settings": run.settings.to_dict(), "evaluation": asdict(evaluation)}
            request = Predict(next(self._ids), names[0], names[1:], plan)
            began = time.perf_counter()
            answers, results = self._call(request, tensors, check)
            if cache is not None:
                run.note(evaluation, Decision(**answers[0].data), time.perf_counter() - began)
                self.last_run = run
            return results["prediction"]

    def end_run(self, run: CacheRun) -> None:
        """Have the workers free what their cache keeps of a run. It is asked for, not waited for, and never raises.

        So Cancel returns at once, whatever step the workers are in, and the error that ended a run stays the one that
        is seen. Requests are carried out in order, and answers that nobody waits for are dropped.
        """
        with self._lock:
            request = EndRun(next(self._ids), run.id)
            for channel in self._channels.values():
                with suppress(ChannelClosedError):  # a rank that is gone keeps nothing; the next request says so
                    channel.send(request)

    def decode(self, latent: Tensor, check: Check = lambda: None) -> Tensor:
        """Image ``[B, 3, H, W]`` in -1..1 (fp32) from a latent ``[B, C, h, w]``."""
        with self._timed("decode"):
            return self._call(DecodeLatent(next(self._ids)), {"latent": latent}, check)[1]["image"]

    def encode(self, image: Tensor, check: Check = lambda: None) -> Tensor:
        """Latent ``[B, C, h, w]`` (fp32) from an image ``[B, 3, H, W]`` in -1..1."""
        with self._lock:
            return self._call(EncodeImage(next(self._ids)), {"image": image}, check)[1]["latent"]

    def report(self) -> dict[str, Any]:
        """The report that docs/report.md explains, field by field."""
        with self._lock:
            ranks = [done.data for done in self._call(Stats(next(self._ids)), {}, lambda: None)[0]]
        cache = None if self.last_run is None else self.last_run.report()
        return make_report(self.config, self.source.family.name, self.seconds, ranks, cache)

    def reset_timings(self) -> None:
        """Begin the report's timings of text, steps and decoding anew."""
        self.seconds.update({name: deque(maxlen=KEPT_TIMINGS) for name in ("text", "steps", "decode")})

    def close(self, state: str = "closed") -> None:
        """End the group. Safe to call at any time, more than once."""
        self.state = state
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._kept.clear()
        self._launcher.stop(list(self._pids.values()))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Holds the group's lock and notes the seconds of what succeeded."""
        with self._lock:
            began = time.perf_counter()
            yield
            self.seconds[name].append(time.perf_counter() - began)

    def _name(self, tensor: Tensor, in_use: Sequence[str], check: Check) -> str:
        """The name that a conditioning tensor has with the workers, who get it if they do not have it.

        The least recently used makes room for it, but none that is ``in_use``.

        Samplers build the tensor anew for each step, so it is known by its content.
        """
        for name, kept in self._kept.items():
            alike = kept.dtype == tensor.dtype and kept.device == tensor.device
            if alike and torch.equal(kept, tensor):  # False at once where the shapes differ
                self._kept.move_to_end(name)
                return name
        number = next(self._ids)
        name = f"t{number}"
        spare = [kept for kept in self._kept if kept not in in_use]
        forget = spare[:1] if len(self._kept) >= KEPT_TENSORS else []
        for old in forget:
            del self._kept[old]
        # Known from when it is sent: where check() gives up the wait for the answer, the workers have it all the same.
        self._kept[name] = tensor.clone()
        try:
            self._call(Keep(number, forget), {name: tensor}, check)
        except (ValueError, RuntimeError):
            self._kept.pop(name, None)
            raise
        return name

    def _call(
        self,
        request: Any,
        tensors: Mapping[str, Tensor],
        check: Check,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> tuple[list[Done], dict[str, Tensor]]:
        """Send a request to every rank and wait for every answer: the answers in rank order, and rank 0's tensors."""
        with self._lock:
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
