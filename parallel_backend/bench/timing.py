"""Time and memory of steps that follow each other, on a GPU or on the CPU."""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..parallel import copies


@dataclass(frozen=True)
class Spread:
    """A few times of the same thing, in ms."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        return cls(statistics.median(times), min(times), max(times))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.least:.1f} to {self.most:.1f})"


@dataclass(frozen=True)
class Steps:
    """Steps that were timed: ms of each; bytes at the peak of them; how many allocations grew the memory in them."""

    ms: list[float]
    peak_bytes: int
    grew: int


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of a piece of work, until the device is done."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def reset_peak(device: str) -> None:
    """Begin `peak_bytes` anew, where that can be."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """Device memory in use at its highest since `reset_peak`; on the CPU the process's resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() + copies.held_bytes()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_steps(step: Callable[[int], Any], count: int, device: str) -> Steps:
    """Time ``step(0) ... step(count - 1)``, after some that warmed up.

    On a GPU nothing waits between steps, as in a pipeline, so that the host runs ahead of the device where it can.
    """
    reset_peak(device)
    step(0)  # the memory is taken anew
    if device == "cpu":
        ms = [1000 * seconds_of(lambda number=number: step(number), device) for number in range(count)]  # type: ignore[misc]
        return Steps(ms, peak_bytes(device), 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for number, mark in enumerate(marks[1:]):
        step(number)
        mark.record()
    torch.cuda.synchronize()
    ms = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return Steps(ms, peak_bytes(device), torch.cuda.memory_stats()["segment.all.allocated"] - segments)
