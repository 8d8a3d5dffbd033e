"""What layouts and text encoders leave behind on a rank of the test world."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from parallel_backend.config import ParallelismConfig
from parallel_backend.mesh import ParallelMesh, build_mesh
from parallel_backend.parallelize import text_axes
from parallel_backend.runtime.rank.engine import Engine

HALF: Any = SimpleNamespace(degree=lambda config, ranks: ranks // 2)
"""A family whose text encoder is sharded over half of the ranks."""


def held_after_loads(
    mesh: ParallelMesh, layout: ParallelismConfig, layouts: list[ParallelismConfig], loads: int
) -> list[tuple[int, int, int]]:
    """Groups, descriptors and threads of this process after each load of a model of every layout."""
    held = []
    for _ in range(loads):
        for again in layouts:
            text_axes(HALF, {}, build_mesh(again, "cpu"))
        dist.barrier()
        groups = len(dist.distributed_c10d._world.pg_map)
        held.append((groups, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return held


def shared(mesh: ParallelMesh, layout: ParallelismConfig) -> bool:
    """Whether axes over the same ranks have one group, whatever they are for."""
    shards, replicas = text_axes(HALF, {}, mesh)
    other = build_mesh(ParallelismConfig(ulysses_size=2, tp_size=4), "cpu")
    return shards.group is other.tp.group and replicas.group is other.cp.group is other.ulysses.group


def counted(mesh: ParallelMesh, layout: ParallelismConfig) -> int:
    """By how much one collective within the text encoder raises what a rank says that it has begun."""
    engine = Engine(torch.device("cpu"), lambda _: None)
    shards, _ = text_axes(HALF, {}, mesh)
    before = engine.meshes.collectives_begun()
    dist.all_reduce(torch.zeros(1), group=shards.group)
    after = engine.meshes.collectives_begun()
    assert before is not None
    assert after is not None
    return after - before
