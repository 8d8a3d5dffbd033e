"""Exchanges on the axes of a mesh, of which one rank is late, or sends something else than it should."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from parallel_backend.config import ParallelismConfig
from parallel_backend.mesh import ParallelMesh
from parallel_backend.runtime.rank import mesh_check
from parallel_backend.runtime.rank.mesh_check import MeshCheck, Unreached, UnreachedError


def check(
    mesh: ParallelMesh, layout: ParallelismConfig, seconds: float = 20.0, axis: str = "", late: int = -1
) -> tuple[list[Unreached], list[str]]:
    """What a rank tells where one of them is late in the first exchange on an axis, and the axes that it came to."""
    told: list[Unreached] = []
    seen: list[str] = []

    def reached(name: str) -> None:
        if name == axis and name not in seen and mesh.world.rank == late:
            time.sleep(4 * seconds)
        seen.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_check, "reached", reached)
        MeshCheck(torch.device("cpu"), seconds, told.append).run(mesh)
    return told, list(dict.fromkeys(seen))


def disturbed(mesh: ParallelMesh, layout: ParallelismConfig, wrong: int) -> tuple[int, ...]:
    """Of whom a rank of a ring finds that something else came than was sent; the rank ``wrong`` sends that."""
    full = torch.full

    def distorted(size, value, **options):
        return full(size, value + (mesh.world.rank == wrong), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "full", distorted)
        try:
            MeshCheck(torch.device("cpu"), 20.0, lambda _: None)._shift("ring", mesh.ring, 1)
        except UnreachedError as error:
            return error.unreached.ranks
    return ()


def busy(mesh: ParallelMesh, layout: ParallelismConfig, seconds: float) -> tuple[list[Unreached], float]:
    """What a rank tells where another is still busy with something else, and how long it waited for that."""
    told: list[Unreached] = []
    checks = MeshCheck(torch.device("cpu"), seconds, told.append)
    dist.barrier(group=mesh.world.group)
    began = time.monotonic()
    if mesh.world.rank == 1:
        time.sleep(3 * seconds)
    checks.meet()
    took = time.monotonic() - began
    checks.run(mesh)
    return told, took
