"""Our block cache and cache-dit's on the trained demo model: PSNR against computed blocks, same prompts, same seeds.

Both are put onto diffusers' own pipeline by their own `enable_cache`, with the same thresholds and defaults, in one
process, one picture at a time; blocks are counted where they are called. For each of the peer's points the table has
the best of ours that computes no more blocks, and ours with the fewest blocks that is no worse.
``python benchmarks/cache_against_cache_dit.py --out docs/cache_against_cache_dit`` (needs cache-dit 1.5.3).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import parallel_backend as ours
from benchmarks.cache_frontier import psnr
from parallel_backend.demo_model import demo_folder
from training.evaluate import draw, held_out

FN = (1, 3)
"""The peer counts in each of FLUX.2's two lists of blocks (3 and 12 in the demo); we draw 1, 2, 3 and 6 over both."""
THRESHOLDS = (0.04, 0.06, 0.08, 0.1, 0.12, 0.16, 0.2, 0.24, 0.3, 0.4, 0.5)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Points of both: settings, computed blocks a picture, PSNR."""
    import cache_dit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = [caption.text for _, caption in held_out(arguments.count)]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def pictures(enable: Callable[[Any], Any] | None) -> tuple[np.ndarray, float]:
        nonlocal calls
        pipeline = Flux2Pipeline.from_pretrained(demo_folder(), torch_dtype=torch.float32).to(device)
        pipeline.set_progress_bar_config(disable=True)
        transformer = pipeline.transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.register_forward_pre_hook(count)
        if enable is not None:
            enable(pipeline)
        calls, out = 0, []
        for seed, prompt in enumerate(prompts):
            out += draw(pipeline, [prompt], 256, 256, seed=seed, steps=arguments.steps)
        return np.stack(out).astype(np.float64), calls / len(prompts)

    def ours_on(values: dict[str, Any], order: int) -> Callable[[Any], Any]:
        calibrator = ours.TaylorSeerCalibratorConfig(order) if order else None
        return lambda pipe: ours.enable_cache(pipe, ours.DBCacheConfig(**values), calibrator_config=calibrator)

    def theirs_on(values: dict[str, Any], order: int) -> Callable[[Any], Any]:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        return lambda pipe: cache_dit.enable_cache(
            pipe, cache_dit.DBCacheConfig(**values), calibrator_config=calibrator
        )

    plain, whole = pictures(None)
    points, began = [], time.perf_counter()
    for head, order, threshold in itertools.product((1, 3, 2, 6), (0, 1), arguments.thresholds):
        values = {
            "Fn_compute_blocks": head,
            "Bn_compute_blocks": 0,
            "residual_diff_threshold": threshold,
            "max_warmup_steps": arguments.warmup,
        }
        for name, enable in (("ours", ours_on), ("cache-dit", theirs_on)):
            if name != "ours" and head not in FN:
                continue
            drawn, blocks = pictures(enable(values, order))
            error = float(((drawn - plain) ** 2).mean())
            point = {"of": name, "Fn": head, "taylorseer": order, "threshold": threshold, "blocks": blocks,
                     "psnr": psnr(error)}  # fmt: skip
            points.append(point)
            print(f"[{time.perf_counter() - began:4.0f}] {point}", flush=True)
        arguments.out.with_suffix(".partial").write_text(json.dumps(points))
    return {"prompts": len(prompts), "steps": arguments.steps, "blocks": whole, "warmup": arguments.warmup,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "points": points}  # fmt: skip


def to_markdown(report: dict[str, Any]) -> str:
    """The peer's points and what ours do there."""
    mine = [point for point in report["points"] if point["of"] == "ours"]
    lines = [
        "| cache-dit: Fn | TaylorSeer | threshold | blocks | PSNR | ours at no more blocks | ours at no less PSNR |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    peers = [point for point in report["points"] if point["of"] != "ours"]
    for point in sorted(peers, key=lambda point: point["blocks"]):
        cheap = max((p["psnr"] for p in mine if p["blocks"] <= point["blocks"]), default=None)
        good = min((p["blocks"] for p in mine if p["psnr"] >= point["psnr"]), default=None)
        lines.append(
            f"| {point['Fn']} | {point['taylorseer'] or ''} | {point['threshold']:g} | {point['blocks']:.0f} | "
            f"{point['psnr']:.1f} | {'none' if cheap is None else f'{cheap:.1f}'} | "
            f"{'none' if good is None else f'{good:.0f}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="files to write, without an ending")
    parser.add_argument("--count", type=int, default=8, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    arguments = parser.parse_args()
    report = measure(arguments)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(to_markdown(report))


if __name__ == "__main__":
    main()
