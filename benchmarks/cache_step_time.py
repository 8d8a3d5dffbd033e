"""Time of a cached step and of the cache's decision at FLUX.2-dev's true shape on one GPU, random bf16 weights.

A static mask says which steps are cached, so that nothing depends on the weights. The decision is timed in steps that
are measured (with a threshold that is always met, or never): by CUDA events around it, so that the wait of the host and
the device's idling while it waits are in, and, in cached steps, by the difference from the same steps by the mask.
``python benchmarks/cache_step_time.py [--width 1024 --height 1024 --rounds 3]``; it needs about 70 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.layout_memory import fill
from parallel_backend.cache import block_cache
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.families import Conditioning, family_of_name
from parallel_backend.memory import reference_config
from parallel_backend.mesh import SINGLE

STEPS = 6
"""Of a run; the first one fills the cache, the second warms up, the others are timed."""
CASES = ((1, 0, 0), (8, 0, 0), (8, 0, 1), (4, 4, 0))
"""Fn, Bn, TaylorSeer's order."""


class Timer:
    """Runs steps of one transformer and times them from start to end of the device's work."""

    def __init__(self, width: int, height: int) -> None:
        family = family_of_name("flux2")
        config = reference_config(family)
        self.transformer = family.build_transformer(config)
        fill(self.transformer)
        channels, rows, columns = config["in_channels"], height // 16, width // 16
        text = family.reference_model.text_config["text_config"]["hidden_size"] * 3
        self.inputs = family.transformer_inputs(
            torch.randn(1, channels, rows, columns, device="cuda", dtype=torch.bfloat16),
            torch.full((1,), 0.5, device="cuda"),
            Conditioning(
                torch.randn(1, 512, text, device="cuda", dtype=torch.bfloat16),
                tensors={"guidance": torch.full((1,), 4.0, device="cuda")},
            ),
        )
        self.images = [self.inputs["hidden_states"], self.inputs["hidden_states"] * 1.5]
        self.cache = BlockCache(self.transformer, family.block_stacks, SINGLE)
        self.runs = 0
        self.decisions: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        decide = block_cache._Pass._decide

        def timed(one: Any, outputs: Any) -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            decide(one, outputs)
            end.record()
            self.decisions.append((begin, end))

        block_cache._Pass._decide = timed  # type: ignore[method-assign]

    def decision_ms(self) -> float:
        """Median of the decisions of the last run, without its first two steps."""
        return statistics.median(begin.elapsed_time(end) for begin, end in self.decisions[2:])

    def seconds(self, head: int, tail: int, order: int, **rules: Any) -> float:
        """A step in a run of equal steps, after the first two."""
        config = DBCacheConfig(Fn_compute_blocks=head, Bn_compute_blocks=tail, max_warmup_steps=1, **rules)
        settings = CacheSettings.with_order(config, order)
        self.runs += 1
        self.decisions.clear()
        for step in range(STEPS):
            if step == 2:
                torch.cuda.synchronize()
                began = time.perf_counter()
            self.cache.plan(settings, Evaluation(str(self.runs), "", float(step), STEPS))
            # Inputs change a little, so that a measured difference is never 0.
            self.transformer(**{**self.inputs, "hidden_states": self.images[step % 2]}, return_dict=False)
        torch.cuda.synchronize()
        took = (time.perf_counter() - began) / (STEPS - 2)
        self.cache.forget(str(self.runs))
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cached = {"steps_computation_mask": (1,) + (0,) * (STEPS - 1), "steps_computation_policy": "static"}
    full = {"steps_computation_mask": (1,) * STEPS}
    rows = []
    with torch.no_grad():
        timer = Timer(arguments.width, arguments.height)
        for head, tail, order in CASES:
            kinds = {
                "full": full,
                "cached": cached,
                "full, measured": {"residual_diff_threshold": 1e-9},
                "cached, measured": {"residual_diff_threshold": 1},
            }
            samples: dict[str, list[float]] = {name: [] for name in kinds}
            decisions: dict[str, list[float]] = {name: [] for name in kinds}
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
                "decision_ms": {name: statistics.median(values) for name, values in decisions.items()},
                "cached_measured_minus_cached_ms": ms["cached, measured"] - ms["cached"],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
