"""Our block cache and cache-dit's on the trained demo model: PSNR against computed blocks, same prompts, same seeds.

Both are put onto diffusers' own pipeline by their own `enable_cache`, with the same thresholds and defaults, in one
process, one picture at a time; blocks are counted where they are called. The table has the peer's points and, for each,
our PSNR at as many blocks and our blocks at the same PSNR, read off the lines between our points.
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
from parallel_backend.drawing.demo_model import demo_folder
from training.evaluate import draw, held_out

OURS, PEER = "ours", "cache-dit"
OURS_FN, PEER_FN = (1,), (1, 3)
"""Of all 15 blocks, and of each of the peer's two lists (3 and 12)."""
THRESHOLDS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.24, 0.3, 0.4)


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
    partial = arguments.out.with_suffix(".partial")  # an interrupted run goes on
    points = json.loads(partial.read_text()) if partial.exists() else []
    done = {(point["of"], point["Fn"], point["taylorseer"], point["threshold"]) for point in points}
    began = time.perf_counter()
    wanted = itertools.chain(
        itertools.product((OURS,), OURS_FN, (0, 1), arguments.ours),
        itertools.product((PEER,), PEER_FN, (0, 1), arguments.peer),
    )
    for name, head, order, threshold in wanted:
        if (name, head, order, threshold) in done:
            continue
        values = {
            "Fn_compute_blocks": head,
            "Bn_compute_blocks": 0,
            "residual_diff_threshold": threshold,
            "max_warmup_steps": arguments.warmup,
        }
        drawn, blocks = pictures((ours_on if name == OURS else theirs_on)(values, order))
        error = float(((drawn - plain) ** 2).mean())
        points.append(
            {"of": name, "Fn": head, "taylorseer": order, "threshold": threshold, "blocks": blocks, "psnr": psnr(error)}
        )
        print(f"[{time.perf_counter() - began:4.0f}] {points[-1]}", flush=True)
        partial.write_text(json.dumps(points))
    partial.unlink(missing_ok=True)
    return {"prompts": len(prompts), "steps": arguments.steps, "blocks": whole, "warmup": arguments.warmup,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "points": points}  # fmt: skip


def to_markdown(report: dict[str, Any]) -> str:
    """The peer's points, and where ours are at the same blocks and at the same PSNR, between our points by a line."""
    curves = [
        [p for p in report["points"] if (p["of"], p["Fn"], p["taylorseer"]) == (OURS, head, order)]
        for head in OURS_FN
        for order in (0, 1)
    ]
    peers = [point for point in report["points"] if point["of"] == PEER]
    lines = [
        "| cache-dit: Fn | TaylorSeer | threshold | blocks | PSNR | ours at its blocks | ours at its PSNR |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for point in sorted(peers, key=lambda point: point["blocks"]):
        at_blocks = [on_line(curve, "blocks", "psnr", point["blocks"]) for curve in curves]
        at_psnr = [on_line(curve, "psnr", "blocks", point["psnr"]) for curve in curves]
        lines.append(
            f"| {point['Fn']} | {point['taylorseer'] or ''} | {point['threshold']:g} | {point['blocks']:.0f} | "
            f"{point['psnr']:.1f} | {max(at_blocks):.1f} | {min(at_psnr):.0f} |"
        )
    return "\n".join(lines) + "\n"


def on_line(points: list[dict[str, Any]], across: str, along: str, place: float) -> float:
    """``along`` where ``across`` is ``place``, between points; beyond them the nearest that is no better than true."""
    points = sorted(points, key=lambda point: point[across])
    if place < points[0][across]:
        # Fewer blocks than ours ever computes: nothing to show. A lower PSNR than ours ever has: our fewest blocks.
        return float("-inf") if along == "psnr" else points[0][along]
    if place > points[-1][across]:
        return points[-1][along] if along == "psnr" else float("inf")
    return float(np.interp(place, [p[across] for p in points], [p[along] for p in points]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="files to write, without an ending")
    parser.add_argument("--count", type=int, default=8, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--ours", type=float, nargs="+", default=THRESHOLDS, help="our thresholds")
    parser.add_argument("--peer", type=float, nargs="+", default=THRESHOLDS[3::2], help="the peer's")
    arguments = parser.parse_args()
    report = measure(arguments)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(to_markdown(report))


if __name__ == "__main__":
    main()
