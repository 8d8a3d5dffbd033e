"""Making room on ranks that see different amounts of memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from parallel_backend.config import ParallelismConfig
from parallel_backend.mesh import ParallelMesh
from parallel_backend.runtime.parts import Place
from parallel_backend.runtime.room import Room


def make_room(mesh: ParallelMesh, layout: ParallelismConfig, size: int, fullest: int) -> tuple[list[str], str, int]:
    """Three parts of 10 bytes on devices of 100, but for one rank's: places afterwards, the error, and its own view."""
    rank = mesh.world.rank
    parts = [_part(f"part {number}") for number in range(3)]
    total = 35 if rank == fullest else 100
    room = Room(
        torch.device("cpu"),
        mesh.world,
        lambda _: None,
        lambda: total - sum(part.nbytes for part in parts if part.place is Place.DEVICE),
        lambda: 10**12,
    )
    error = ""
    try:
        room.make(size, 0, "the next part", [(part, False) for part in parts])
    except ValueError as found:
        error = str(found)
    return [part.place.value for part in parts], error, room.least_available()


def _part(label: str) -> Any:
    part = SimpleNamespace(nbytes=10, place=Place.DEVICE, label=label, host=None)

    def drop() -> None:
        part.place = Place.FILE

    part.drop = drop
    return part
