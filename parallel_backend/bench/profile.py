"""Where the time of a step goes, read off a profile: GEMM, attention, communication (hidden or not), the rest, gaps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity

KINDS = {
    "communication": re.compile(r"nccl|gloo:|c10d::|multimem|symm_mem|PtoP|_await_kernel", re.IGNORECASE),
    "attention": re.compile(r"sdpa|fmha|flash|scaled_dot_product", re.IGNORECASE),
    "GEMM": re.compile(r"gemm|nvjet|xmma|cutlass|splitk|aten::(addmm|mm|bmm|baddbmm)$", re.IGNORECASE),
}
"""Kernels (operators on the CPU) by their names, the first that fits; what fits none is the rest."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Work:
    """A kernel, or an operator on the CPU: when it ran, in ms."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """The kind of a kernel or operator of a name."""
    return next((kind for kind, names in KINDS.items() if names.search(name)), "rest")


def profile_step(step: Callable[[], Any], device: str) -> list[Work]:
    """What ran during one step."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    return [
        Work(event.name, event.time_range.start / 1000, event.time_range.end / 1000)
        for event in profiler.events() or ()
        if event.device_type == wanted and not event.is_user_annotation and (device == "cuda" or _counts(event))
    ]


def _counts(operator: Any) -> bool:
    """Whether an operator on the CPU is work of its own, not what calls others or is called by a GEMM or the like."""
    caller = operator.cpu_parent
    while caller is not None:
        if kind_of(caller.name) != "rest":
            return False
        caller = caller.cpu_parent
    return kind_of(operator.name) != "rest" or not operator.cpu_children


def shares(work: Sequence[Work], step_ms: float) -> dict[str, Any]:
    """Time of a step's work by kind.

    Args:
        work: of one step.
        step_ms: what a step takes without the profiler.

    Returns:
        ``ms``: sums of GEMM, attention, communication and the rest; ``exposed_ms`` and ``hidden_ms``: communication
        during which nothing, or something, was computed; ``busy_ms``: time in which anything ran; ``gaps_ms``: the rest
        of ``step_ms``; ``count``; and the longest of the rest as ``[ms, count, name]``.
    """
    kinds: dict[str, list[Work]] = defaultdict(list)
    rest: dict[str, list[float]] = defaultdict(list)
    for one in work:
        kinds[one.kind].append(one)
        if one.kind == "rest":
            rest[one.name].append(one.end - one.start)
    talking = union((one.start, one.end) for one in kinds["communication"])
    computing = union((one.start, one.end) for one in work if one.kind != "communication")
    busy = length(union([*talking, *computing]))
    exposed = busy - length(computing)
    longest = sorted(((sum(times), len(times), name[:160]) for name, times in rest.items()), reverse=True)
    return {
        "ms": {kind: sum(one.end - one.start for one in kinds[kind]) for kind in (*KINDS, "rest")},
        "exposed_ms": exposed,
        "hidden_ms": length(talking) - exposed,
        "busy_ms": busy,
        "gaps_ms": max(0.0, step_ms - busy),
        "count": len(work),
        "attention": sorted({one.name[:120] for one in kinds["attention"]}),
        "longest_rest": [[round(ms, 3), count, name] for ms, count, name in longest[:12]],
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The time that is covered by any of the intervals, as intervals apart from each other."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Time that intervals apart from each other cover."""
    return sum(end - start for start, end in intervals)
