"""The cache of a pipeline in a script, where nobody says what run and step it is: told from the transformer's calls."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .block_cache import BlockCache, Model
from .config import CacheSettings
from .run import CacheRun


class PipelineCache:
    """Plans each forward of a transformer.

    A run begins where the scheduler has been set to new timesteps, as each call of a pipeline does, and where the
    timestep of a stream rises again, which is all that there is to see without a scheduler.

    Streams are what the pipeline calls its `cache_context`, such as "cond" and "uncond"; pipelines without have one.

    Args:
        cache: of the transformer.
        settings: for all runs.
        schedule: tells the timesteps that the scheduler is set to now, or None.
    """

    def __init__(self, cache: BlockCache, settings: CacheSettings, schedule: Callable[[], Any]) -> None:
        self.cache, self.settings, self.schedule = cache, settings, schedule
        self.run: CacheRun | None = None
        self._scheduled: Any = None  # kept, so that no other tensor is taken for it
        self.stream = ""
        self._timesteps: dict[str, list[float]] = {}
        self._began: Any = None
        transformer = cache.transformer
        self._hooks = [
            transformer.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]
        self._signature = inspect.signature(type(transformer).forward)
        if hasattr(transformer, "cache_context"):
            self._cache_context = transformer.cache_context
            transformer.cache_context = self._named_stream

    def remove(self) -> None:
        """Leave the transformer as it was; what was kept is freed."""
        for hook in self._hooks:
            hook.remove()
        self.cache.transformer.__dict__.pop("cache_context", None)
        self.cache.remove()

    @contextmanager
    def _named_stream(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        self.stream = name
        try:
            with self._cache_context(name, *args, **kwargs):
                yield
        finally:
            self.stream = ""

    def _before(self, transformer: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._signature.bind(transformer, *args, **kwargs).arguments
        timestep = float(arguments["timestep"].flatten()[0])
        seen = self._timesteps.setdefault(self.stream, [])
        schedule = self.schedule()
        # Samplers go down; one that evaluates twice at a level never does so at the first.
        again = seen and (timestep > seen[-1] or timestep == seen[0])
        if self.run is None or schedule is not self._scheduled or again:
            if self.run is not None:
                self.cache.forget(self.run.id)
            self._scheduled = schedule
            self.run = CacheRun(self.settings, steps=None if schedule is None else len(schedule))
            self._timesteps = {self.stream: (seen := [])}
        seen.append(timestep)
        self._evaluation = self.run.evaluation(self.stream, float(len(seen) - 1))
        self.cache.plan(self.settings, self._evaluation)
        self._began = _now(arguments["timestep"].device)

    def _after(self, *_: Any) -> None:
        assert self.run is not None
        assert self.cache.last is not None
        self.run.note(self._evaluation, self.cache.last, _since(self._began))


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _since(began: Any) -> float | Callable[[], float]:
    """Seconds since `_now`; on a GPU they are read when asked for, so that nothing waits for it."""
    if isinstance(began, float):
        return time.perf_counter() - began
    end = torch.cuda.Event(enable_timing=True)
    end.record()

    def seconds() -> float:
        end.synchronize()
        return began.elapsed_time(end) / 1000

    return seconds
