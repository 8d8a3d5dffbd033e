"""Which devices a group of ranks runs on: what the user wrote, checked against what the machine has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..limits import cores
from .lost_gpus import left_out, working_gpus
from .visible_gpus import automatic, gpu_kinds, gpu_names, hidden_gpus

MOST_CPU_RANKS = 16
"""Or as many as there are cores. Each rank is a process of some hundred MiB, and a slip of the mouse makes many."""


class TooManyRanksError(ValueError):
    """More ranks than the devices can take.

    Args:
        text: what is wrong, with the remedy.
        most: how many ranks they can take.
    """

    def __init__(self, text: str, most: int) -> None:
        super().__init__(text)
        self.most = most


@dataclass(frozen=True)
class Devices:
    """The devices of a group's ranks, in rank order.

    ``kind`` is ``"cpu"`` or ``"cuda"``; ``visible`` holds, for CUDA, one entry of CUDA_VISIBLE_DEVICES a rank.
    """

    kind: str
    visible: tuple[str, ...] = ()

    def overlaps(self, other: Devices) -> bool:
        """Whether two groups would share a GPU."""
        return bool(set(self.visible) & set(other.visible))


def resolve_devices(spec: str, ranks: int) -> Devices:
    """Turn ``"auto"``, ``"cpu"`` or a list such as ``"0,1"`` or ``"cuda:0,cuda:1"`` into devices for ``ranks`` ranks.

    ``auto`` takes GPUs of one kind, where there are as many, else the first ones, or the CPU where there is no GPU;
    never one that failed for good (`lost_gpus`).

    Raises:
        ValueError: fewer GPUs than ranks, a GPU that is not there or named twice, a list that cannot be read, or more
            ranks than a CPU can do with.
    """
    spec = spec.strip().lower()
    if spec == "cpu":
        return _on_cpu(ranks)
    count = torch.cuda.device_count()
    if spec in ("", "auto"):
        if count == 0:
            return _on_cpu(ranks)
        working = working_gpus(count)
        if len(working) < ranks:
            raise TooManyRanksError(
                f"the layout has {ranks} ranks but this machine has {count} GPU(s){hidden_gpus(count)}"
                f"{left_out(count)}; choose the device 'cpu', or degrees with a product of at most {len(working)}",
                len(working),
            )
        chosen = working
        if len(working) > ranks:
            kinds = gpu_kinds(count)
            chosen = [working[index] for index in automatic(ranks, [kinds[index] for index in working])]
    else:
        chosen = [_index(part) for part in spec.split(",")]
        absent = sorted({index for index in chosen if index >= count})
        if absent:
            raise ValueError(
                f"the devices {spec!r} name GPU {', '.join(map(str, absent))}, but this machine has {count} GPU(s)"
                f"{hidden_gpus(count)}"
            )
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"the devices {spec!r} name a GPU twice; each rank needs one of its own")
        if len(chosen) != ranks:
            raise TooManyRanksError(
                f"the devices {spec!r} are {len(chosen)} GPU(s), but the layout has {ranks} rank(s); choose degrees "
                f"with a product of {len(chosen)}",
                len(chosen),
            )
    names = gpu_names(count)
    return Devices("cuda", tuple(names[index] for index in chosen))


def gpu_numbers(spec: str) -> list[int] | None:
    """The GPUs that a list such as ``"0,1"`` names; none of them for ``"cpu"``, and None for ``"auto"``.

    Raises:
        ValueError: a GPU that is not there or named twice, or a list that cannot be read.
    """
    named = [part for part in spec.strip().lower().split(",") if part]
    if named in ([], ["auto"]):
        return None
    return [] if resolve_devices(spec, len(named)).kind == "cpu" else [_index(part) for part in named]


def _on_cpu(ranks: int) -> Devices:
    most = max(MOST_CPU_RANKS, cores())
    if ranks > most:
        raise TooManyRanksError(
            f"the layout has {ranks} ranks, as many processes on this CPU; choose degrees with a product of at most "
            f"{most}",
            most,
        )
    return Devices("cpu")


def _index(part: str) -> int:
    digits = part.strip().removeprefix("cuda:")
    if not digits.isdigit():
        raise ValueError(f"cannot read the device {part.strip()!r}; write 'auto', 'cpu', or GPUs such as '0,1,2,3'")
    return int(digits)
