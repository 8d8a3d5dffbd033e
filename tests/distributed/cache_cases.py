"""Cached sampling runs for the ranks of the test world, and what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parallel_backend.cache import block_cache
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.config import ParallelismConfig
from parallel_backend.mesh import SINGLE, ParallelMesh
from parallel_backend.parallelize import enable_cache, parallelize_transformer, summary
from tests.distributed import qwen_cases
from tests.distributed.cases import FLUX2, flux2_inputs, tiny_transformer

STEPS = 12
THRESHOLD = 0.23


@dataclass
class Result:
    """Per evaluation: computed or not, measured difference, calls of all_reduce and tolist; and the last latents."""

    computed: list[bool]
    diffs: list[float | None]
    latents: torch.Tensor
    all_reduces: list[int]
    syncs: list[int]


def settings(order: int = 0, **changes: Any) -> CacheSettings:
    values = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": THRESHOLD, **changes}
    return CacheSettings.with_order(DBCacheConfig(**values), order)


def inputs_at(step: int, inputs: dict[str, Any], drift: torch.Tensor) -> dict[str, Any]:
    """Inputs that move away from step to step, as those of a sampler do."""
    level = torch.full_like(inputs["timestep"], 1 - 0.0001 * step)
    return {**inputs, "hidden_states": inputs["hidden_states"] + 0.0005 * step**2 * drift, "timestep": level}


def new_drift(inputs: dict[str, Any]) -> torch.Tensor:
    """The direction in which they move."""
    return torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(9))


def sample(
    mesh: ParallelMesh | None, layout: ParallelismConfig, text: int, sizes: list[tuple[int, int]], batch: int,
    plan: CacheSettings, shifted: bool = False, qwen: bool = False,
) -> Result:  # fmt: skip
    """Euler steps with a cached transformer; without a mesh in this process alone.

    ``shifted`` has the first half of the image's tokens drift fast; ``qwen`` runs Qwen-Image instead of FLUX.2.
    """
    if qwen:
        family, model = qwen_cases.QWEN, qwen_cases.tiny_transformer(num_layers=5)
        inputs: dict[str, Any] = qwen_cases.transformer_inputs(text, sizes, batch)
    else:
        family, model = FLUX2, tiny_transformer(num_single_layers=4)
        inputs = flux2_inputs(text, sizes, batch)
    if mesh is not None:
        parallelize_transformer(model, family.transformer, layout, mesh)
    cache = BlockCache(
        model,
        family.transformer.block_stacks,
        SINGLE if mesh is None else mesh.world,
        family.transformer.picture_tokens,
    )
    x, tokens = inputs["hidden_states"], sizes[0][0] * sizes[0][1]
    drift = new_drift(inputs)
    if shifted:
        drift[:, : tokens // 2] *= 20
    counts, watched = {"all_reduce": 0, "tolist": 0}, (dist.all_reduce, torch.Tensor.tolist)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    dist.all_reduce, torch.Tensor.tolist = counted("all_reduce", watched[0]), counted("tolist", watched[1])
    result = Result([], [], x, [], [])
    try:
        for step in range(STEPS):
            before = dict(counts)
            cache.plan(plan, Evaluation("run", "", float(step), STEPS))
            out = model(**inputs_at(step, {**inputs, "hidden_states": x}, drift)).sample
            x = torch.cat([x[:, :tokens] - 1e-4 * out[:, :tokens], x[:, tokens:]], dim=1)
            assert cache.last is not None
            result.computed.append(cache.last.computed)
            result.diffs.append(cache.last.diff)
            result.all_reduces.append(counts["all_reduce"] - before["all_reduce"])
            result.syncs.append(counts["tolist"] - before["tolist"])
    finally:
        dist.all_reduce, torch.Tensor.tolist = watched
    result.latents = torch.cat([x, out[:, :tokens]], dim=1)
    return result


def local_differences(mesh: ParallelMesh, layout: ParallelismConfig, *args: Any) -> tuple[list[bool], list[float]]:
    """The decisions of a run, and this rank's own difference at each step that was measured."""
    own: list[float] = []
    measure = block_cache.change

    def note(after: torch.Tensor, before: torch.Tensor, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if kept is not None:
            own.append(((kept - (after - before)).abs().sum() / kept.abs().sum()).item())
        return measure(after, before, kept)

    block_cache.change = note
    try:
        return sample(mesh, layout, *args).computed, own
    finally:
        block_cache.change = measure


def one_rank_broken(mesh: ParallelMesh, layout: ParallelismConfig, *args: Any) -> list[bool]:
    """The decisions of a run in which the first thing that the last rank measures is no number."""
    measure, measured = block_cache.change, []

    def spoil(after: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        residual, sums = measure(after, *others)
        if others[-1] is not None and mesh.world.rank == mesh.world.degree - 1:
            measured.append(sums)
            sums = sums * (float("nan") if len(measured) == 1 else 1)
        return residual, sums

    block_cache.change = spoil
    try:
        return sample(mesh, layout, *args).computed
    finally:
        block_cache.change = measure


def library(mesh: ParallelMesh | None, layout: ParallelismConfig | None) -> tuple[torch.Tensor, list[bool]]:
    """`enable_cache` with a cache on all ranks of the world (or alone): the last output and the decisions."""
    model, inputs = tiny_transformer(num_single_layers=4), flux2_inputs(5, [(3, 5)], 1)
    plan = settings(1)
    enable_cache(model, plan.config, calibrator_config=plan.calibrator, parallelism_config=layout)
    for step in range(STEPS):
        sigma = torch.full((1,), 1 - 0.0001 * step)
        out = model(**{**inputs, "timestep": sigma}).sample
    return out, [evaluation["computed"] for evaluation in summary(model)["evaluations"]]
