"""What one rank measures of a shape on a layout; ``python -m parallel_backend bench`` starts the ranks.

With ``rank_only`` this rank is alone (`alone`): its shapes, weights, activations and compute are true, exchanges with
the others cost nothing but a copy. A process can hold one such group.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cache.block_cache import BlockCache
from ..cache.config import CacheSettings, parse_cache
from ..cache.decision import Decision, Evaluation
from ..config import ParallelismConfig, Speed
from ..limits import memory
from ..mesh import ParallelMesh, build_mesh, single_mesh
from ..parallel import copies
from ..planning.memory import GIB
from .alone import start_alone
from .model import build_text_model, build_transformer, make_inputs, transformer_config, weight_bytes
from .profile import profile_step, shares
from .shapes import Shape, shape_of
from .timing import Spread, peak_bytes, reset_peak, seconds_of, time_steps

WARMUP = 3
TEXT_ROUNDS = 3


@dataclass(frozen=True)
class Task:
    """What is to be measured; see the arguments of ``python -m parallel_backend bench``."""

    shape: str
    ulysses: int
    ring: int
    tp: int
    width: int
    height: int
    steps: int
    device: str
    dtype: str
    text: int
    frames: int = 1
    blocks: int | None = None
    compile: bool = False
    cuda_graphs: bool = False
    copy_engines: bool = False
    cache: str | None = None
    weights: str = ""
    rank_only: bool = False

    @property
    def layout(self) -> ParallelismConfig:
        return ParallelismConfig(self.ulysses, self.ring, self.tp)

    @property
    def speed(self) -> Speed:
        return Speed(self.compile, self.cuda_graphs, self.copy_engines)


def start_ranks(task: Task) -> ParallelMesh:
    """This process's place among the ranks: a true one under torchrun, or rank 0 of a world that is not there."""
    world = task.layout.world_size
    if task.rank_only and world > 1:
        start_alone(world)
    elif world > 1 and task.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    elif world > 1:
        dist.init_process_group("gloo")
    return build_mesh(task.layout, task.device, copies.usable(task.copy_engines))


@torch.no_grad()
def measure(task: Task, mesh: ParallelMesh) -> dict[str, Any]:
    """This rank's figures, under the names that docs/performance.md explains."""
    shape, dtype = shape_of(task.shape), getattr(torch, task.dtype)
    figures: dict[str, Any] = {"weight_bytes": {}, "peak_bytes": {}}
    _measure_text(shape, mesh, dtype, task, figures)

    began = time.perf_counter()
    transformer = build_transformer(shape, task.layout, mesh, dtype, task.blocks, task.speed, task.weights)
    figures["build_s"] = time.perf_counter() - began
    figures["weight_bytes"]["transformer"] = weight_bytes(transformer)
    sampler = Sampler(task, transformer, mesh)
    figures["first_step_s"] = seconds_of(sampler.evaluate, task.device)
    for _ in range(WARMUP - 1):
        sampler.evaluate()
    timed = time_steps(sampler.step, task.steps, task.device)
    step = Spread.of(timed.ms)
    figures |= {"step_ms": timed.ms, "step": step.to_dict(), "memory_grew": timed.grew}
    figures["peak_bytes"]["step"] = timed.peak_bytes
    figures["compile_s"] = max(0.0, figures["first_step_s"] - step.median / 1000) if task.compile else None
    figures["cache"] = sampler.cache_figures(timed.ms)
    figures["profile"] = shares(profile_step(sampler.evaluate, task.device), step.median)
    if mesh.world.is_split and not task.rank_only:
        prediction = sampler.evaluate()
        del transformer, sampler
        gc.collect()
        reset_peak(task.device)
        figures["one_gpu"] = _compare(task, shape, mesh, dtype, prediction)
    return figures


def _measure_text(shape: Shape, mesh: ParallelMesh, dtype: torch.dtype, task: Task, figures: dict[str, Any]) -> None:
    """Encode a prompt a few times; the text encoder is gone afterwards, so that the transformer has the room."""
    figures["text_s"] = None
    built = build_text_model(shape, mesh, dtype)
    if built is None:
        return
    model, family, config = built
    figures["weight_bytes"]["text_encoder"] = weight_bytes(model)
    ids = torch.arange(task.text, device=task.device)[None] % 1000
    kind = family.needs_text_encoder()
    encode = functools.partial(kind.encode, model, ids, torch.ones_like(ids), kind.layers(config))
    encode()
    reset_peak(task.device)
    times = [seconds_of(encode, task.device) for _ in range(TEXT_ROUNDS)]
    figures["text_s"] = Spread.of(times).median
    figures["peak_bytes"]["text_encoder"] = peak_bytes(task.device)
    del built, model, encode
    gc.collect()
    reset_peak(task.device)


def begin_step(cache: BlockCache, settings: CacheSettings, number: int, steps: int) -> None:
    """Tell a block cache which step of a run comes next; step 0 begins another run."""
    if number == 0:
        cache.forget("run")
    cache.plan(settings, Evaluation("run", "", float(number), steps))


class Sampler:
    """Evaluates a transformer as a sampler would; with the cache, where there is one, over changing latents."""

    def __init__(self, task: Task, transformer: Any, mesh: ParallelMesh) -> None:
        shape = shape_of(task.shape)
        self.transformer, self.steps = transformer, task.steps
        self.family, _ = transformer_config(shape)
        dtype = getattr(torch, task.dtype)
        self.x, self.inputs = make_inputs(shape, task.width, task.height, task.text, task.device, dtype, task.frames)
        self.settings = None if task.cache is None else parse_cache(task.cache)
        self.decisions: list[Decision] = []
        if self.settings is not None:
            self.cache = BlockCache(transformer, self.family.transformer.block_stacks, mesh.world)

    def evaluate(self, scale: float = 1.0) -> Tensor:
        """The prediction for the latent times ``scale``, with every block computed."""
        inputs = self.inputs if scale == 1 else self.inputs | {"hidden_states": self.inputs["hidden_states"] * scale}
        return self.family.transformer.evaluate(self.transformer, inputs, self.x)

    def step(self, number: int) -> None:
        """A step of a run; step 0 begins one."""
        if self.settings is None:
            self.evaluate()
            return
        if number == 0:
            self.decisions = []
        begin_step(self.cache, self.settings, number, self.steps)
        self.evaluate(1 - 0.5 * number / self.steps)
        assert self.cache.last is not None
        self.decisions.append(self.cache.last)

    def cache_figures(self, ms: list[float]) -> dict[str, Any] | None:
        """How many steps of the run were computed and cached, and what they took; None without a cache."""
        if self.settings is None:
            return None
        times: dict[bool, list[float]] = {True: [], False: []}
        for decision, taken in zip(self.decisions, ms, strict=True):
            times[decision.computed].append(taken)
        return {
            "settings": self.settings.to_dict(),
            "computed": len(times[True]),
            "cached": len(times[False]),
            "computed_ms": statistics.median(times[True]) if times[True] else None,
            "cached_ms": statistics.median(times[False]) if times[False] else None,
        }


def _compare(
    task: Task, shape: Shape, mesh: ParallelMesh, dtype: torch.dtype, prediction: Tensor
) -> dict[str, Any] | None:
    """The same weights whole on rank 0: what a step takes there, and how far the ranks' prediction is from its.

    The error is that of all values: the norm of the difference over the norm. None on other ranks; ``note`` says why
    where the model does not fit.
    """
    figures: dict[str, Any] | None = None
    if mesh.world.rank == 0:
        family, config = transformer_config(shape, task.blocks)
        need = sum(p.numel() for p in family.transformer.build(config).parameters()) * dtype.itemsize + 2 * GIB
        free = torch.cuda.mem_get_info()[0] if task.device == "cuda" else memory().available or 0
        if need > free:
            figures = {"note": f"one device does not hold it: {need / GIB:.0f} GiB of {free / GIB:.0f} free"}
        else:
            whole = single_mesh(task.device)
            transformer = build_transformer(
                shape, ParallelismConfig(), whole, dtype, task.blocks, task.speed, task.weights
            )
            sampler = Sampler(replace(task, cache=None), transformer, whole)
            expected = sampler.evaluate().float()
            step = Spread.of(time_steps(sampler.step, task.steps, task.device).ms)
            error = (prediction.float() - expected).norm() / expected.norm()
            figures = {"step": step.to_dict(), "error": error.item()}
    dist.barrier()
    return figures


def main() -> None:
    """Measure what ``task.json`` in a folder says; each rank writes its figures there, as ``rank0.json`` and so on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    task = Task(**json.loads((folder / "task.json").read_text()))
    mesh = start_ranks(task)
    figures = {"device": device_name(task.device), **measure(task, mesh)}
    (folder / f"rank{mesh.world.rank}.json").write_text(json.dumps(figures))
    if dist.is_initialized() and not task.rank_only:
        dist.destroy_process_group()


def device_name(device: str) -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


if __name__ == "__main__":
    main()
