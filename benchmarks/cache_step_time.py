"""Time of a cached step and of the cache's decision at FLUX.2-dev's true shape, random bf16 weights.

A static mask says which steps are cached, so that nothing depends on the weights. The decision is timed in steps that
are measured (with a threshold that is always met, or never): by CUDA events around it, so that the wait of the host and
the device's idling while it waits are in, and, in cached steps, by the difference from the same steps by the mask.
``python benchmarks/cache_step_time.py [--rounds 3]`` needs about 70 GiB; started by ``torchrun --nproc-per-node 2`` it
is two Ulysses ranks, which meet before they decide together, and rank 0 says what both took. ``--shape tiny --device
cpu`` tries it out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_backend.bench.model import build_transformer, make_inputs, transformer_config
from parallel_backend.bench.rank import Task, device_name, start_ranks
from parallel_backend.bench.shapes import SHAPES, shape_of
from parallel_backend.bench.timing import synchronize
from parallel_backend.cache import block_cache
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.mesh import ParallelMesh

STEPS = 6
"""Of a run; the first one fills the cache, the second warms up, the others are timed."""
CASES = ((1, 0, 0), (8, 0, 0), (8, 0, 1), (4, 4, 0))
"""Fn, Bn, TaylorSeer's order."""


def mark(device: str) -> Any:
    """A place in the device's work; `elapsed_ms` says what lies between two of them, once the work is done."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(begin: Any, end: Any) -> float:
    return 1000 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


class Timer:
    """Runs steps of one transformer and times them from start to end of the device's work."""

    def __init__(self, task: Task, mesh: ParallelMesh) -> None:
        shape, dtype = shape_of(task.shape), getattr(torch, task.dtype)
        self.family, _ = transformer_config(shape)
        self.device = task.device
        self.transformer = build_transformer(shape, task.layout, mesh, dtype)
        self.x, self.inputs = make_inputs(shape, task.width, task.height, task.text, task.device, dtype)
        self.images = [self.inputs["hidden_states"], self.inputs["hidden_states"] * 1.5]
        self.cache = BlockCache(self.transformer, self.family.transformer.block_stacks, mesh.world)
        self.runs = 0
        self.decisions: list[tuple[Any, Any, Any]] = []
        """Where each began: meeting the other ranks, deciding, what comes then."""
        decide = block_cache._Pass._decide
        nothing = torch.zeros(1, device=task.device)

        def timed(one: Any, outputs: Any) -> None:
            meet = mark(self.device)
            if mesh.world.is_split:
                dist.all_reduce(nothing, group=mesh.world.group)
            begin = mark(self.device)
            decide(one, outputs)
            self.decisions.append((meet, begin, mark(self.device)))

        block_cache._Pass._decide = timed  # type: ignore[method-assign]

    def decision_ms(self) -> tuple[float, ...]:
        """Medians of meeting and deciding in the last run, without its first two steps."""
        return tuple(
            statistics.median(elapsed_ms(*marks[part : part + 2]) for marks in self.decisions[2:]) for part in (0, 1)
        )

    def seconds(self, head: int, tail: int, order: int, **rules: Any) -> float:
        """A step in a run of equal steps, after the first two."""
        config = DBCacheConfig(Fn_compute_blocks=head, Bn_compute_blocks=tail, max_warmup_steps=1, **rules)
        settings = CacheSettings.with_order(config, order)
        self.runs += 1
        self.decisions.clear()
        for step in range(STEPS):
            if step == 2:
                synchronize(self.device)
                began = time.perf_counter()
            self.cache.plan(settings, Evaluation(str(self.runs), "", float(step), STEPS))
            # Inputs change a little, so that a measured difference is never 0.
            inputs = {**self.inputs, "hidden_states": self.images[step % 2]}
            self.family.transformer.evaluate(self.transformer, inputs, self.x)
        synchronize(self.device)
        took = (time.perf_counter() - began) / (STEPS - 2)
        self.cache.forget(str(self.runs))
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="flux2-dev", help="default: %(default)s")
    parser.add_argument("--width", type=int, help="default: what suits the shape")
    parser.add_argument("--height", type=int, help="as --width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape, ranks = shape_of(arguments.shape), int(os.environ.get("WORLD_SIZE", "1"))
    width, height = arguments.width or shape.side, arguments.height or shape.side
    dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    task = Task(arguments.shape, ranks, 1, 1, width, height, STEPS, arguments.device, dtype, shape.text_tokens)
    mesh = start_ranks(task)
    cached = {"steps_computation_mask": (1,) + (0,) * (STEPS - 1), "steps_computation_policy": "static"}
    full = {"steps_computation_mask": (1,) * STEPS}
    rows = []
    with torch.no_grad():
        timer = Timer(task, mesh)
        for head, tail, order in CASES:
            if head + tail >= timer.cache.blocks:
                continue
            kinds = {
                "full": full,
                "cached": cached,
                "full, measured": {"residual_diff_threshold": 1e-9},
                "cached, measured": {"residual_diff_threshold": 1},
            }
            samples: dict[str, list[float]] = {name: [] for name in kinds}
            decisions: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}
            for turn in range(arguments.rounds + 1):
                for name, rules in kinds.items():
                    took = 1000 * timer.seconds(head, tail, order, **rules)
                    if turn:  # the first turn warms up
                        samples[name].append(took)
                        decisions[name].append(timer.decision_ms())
            ms = {name: statistics.median(values) for name, values in samples.items()}
            row: dict[str, Any] = {
                "Fn": head,
                "Bn": tail,
                "taylorseer": order,
                "ms": ms,
                "spread_ms": {name: max(values) - min(values) for name, values in samples.items()},
                "bound_ms": (head + tail) / timer.cache.blocks * ms["full"] + 2,
                "meeting_ms": {name: statistics.median(one[0] for one in found) for name, found in decisions.items()},
                "decision_ms": {name: statistics.median(one[1] for one in found) for name, found in decisions.items()},
                "cached_measured_minus_cached_ms": ms["cached, measured"] - ms["cached"],
            }
            rows.append(row)
            if mesh.world.rank == 0:
                print(json.dumps(row), flush=True)
    if arguments.json and mesh.world.rank == 0:
        report = {"device": device_name(task.device), "ranks": ranks, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
