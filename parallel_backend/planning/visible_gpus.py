"""Which of a machine's GPUs this process sees, what hides the others, and which of unlike ones belong together."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")
"""Has an entry for each GPU that the driver shows here."""


def gpu_names(count: int) -> list[str]:
    """The names of the GPUs that this process sees: entries of CUDA_VISIBLE_DEVICES, or numbers."""
    inherited = os.environ.get(VISIBLE)
    names = inherited.split(",") if inherited else [str(index) for index in range(count)]
    return [name.strip() for name in names[:count]]


def present_gpus() -> int:
    """GPUs that the driver shows on this machine, or in this container; 0 where it is not known."""
    try:
        return len(os.listdir(DRIVER))
    except OSError:
        return 0


def hidden_gpus(count: int) -> str:
    """What hides GPUs from this process, which sees so many, and how many; with the remedy. Empty where nothing does.

    It is a remark in parentheses, with a blank before it.
    """
    value = os.environ.get(VISIBLE)
    if value is None:
        return ""
    instances = [name for name in value.split(",") if name.strip().startswith("MIG-")]
    if instances:
        return (
            f" ({VISIBLE} names {len(instances)} MIG instance(s), of which a process can use one; take GPUs without "
            "MIG for more ranks)"
        )
    present = present_gpus()
    if present <= count:
        return ""
    return (
        f" ({VISIBLE}={value!r} hides {present - count} of {present}; unset it, or start ComfyUI without "
        "--cuda-device, which sets it)"
    )


def gpu_kinds(count: int) -> list[tuple[str, int]]:
    """Name and GiB of memory of each of the GPUs that this process sees, as far as torch can tell."""
    try:
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
    except (AssertionError, RuntimeError):  # of CUDA, which whoever uses them will say
        return [("", 0)] * count
    return [(properties.name, round(properties.total_memory / 2**30)) for properties in found]


def of_one_kind(kinds: Sequence[Hashable], least: int = 1) -> list[list[int]]:
    """GPUs that are equal, as many as there are of each kind; kinds of fewer than ``least`` are left out.

    In the order of their first ones, which for CUDA is that of speed, unless a variable says otherwise.
    """
    groups = [[index for index, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
    return [group for group in groups if len(group) >= least]


def automatic(ranks: int, kinds: Sequence[tuple[str, int]]) -> list[int]:
    """The GPUs that ``auto`` stands for: so many of one kind, the one with the most memory, or else the first ones.

    Ranks wait for each other, so that the slowest GPU, and the one with the least memory, is the measure of all.
    """
    groups = of_one_kind(kinds, ranks)
    chosen = list(range(ranks))
    if groups:
        chosen = max(groups, key=lambda group: kinds[group[0]][1])[:ranks]
    if len(set(kinds)) > 1:
        _say(f"{words(chosen, kinds)}, of {len(kinds)} unlike GPUs")
    return chosen


def words(chosen: Sequence[int], kinds: Sequence[tuple[str, int]]) -> str:
    """What was taken: ``auto takes GPU 1, 2 (2 x NVIDIA L20)``."""
    names = Counter(kinds[index][0] for index in chosen)
    listed = ", ".join(f"{count} x {name}" for name, count in names.items())
    return f"auto takes GPU {', '.join(map(str, chosen))} ({listed})"


@functools.lru_cache  # once
def _say(text: str) -> None:
    log.info("%s; name others in 'devices'", text)
