"""What the block cache costs in quality and gains in time on the trained demo model, for many settings, one command.

Each picture of the held-out prompts is drawn without a cache and with each setting, each with its own decisions, and
compared: PSNR and SSIM against the picture without, and how many scenes are right (the checker of ``training``).
``python benchmarks/cache_frontier.py --out docs/cache_frontier`` writes a JSON, a Markdown table and a plot; with
``--redraw`` the latter two anew from the JSON. Minutes on a GPU, hours on a CPU (try ``--count 8 --steps 28 --fn 1``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Pipeline
from skimage.metrics import structural_similarity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cached_rows import CachedRows
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.drawing.demo_model import demo_folder
from parallel_backend.families import family_of_transformer
from parallel_backend.mesh import SINGLE
from training.checker import Verdict, _templates, judge, rates
from training.evaluate import GUIDANCE, comfy_context, comfy_sigmas, held_out, sample
from training.models import TEXT_LENGTH, image_ids, text_ids

THRESHOLDS = (0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.3, 0.4, 0.5)
CHUNK = 25


def settings_of(threshold: float, head: int, order: int, warmup: int) -> CacheSettings:
    config = DBCacheConfig(Fn_compute_blocks=head, residual_diff_threshold=threshold, max_warmup_steps=warmup)
    return CacheSettings.with_order(config, order)


def compare(pictures: np.ndarray, plain: np.ndarray, cases: Sequence[Any]) -> list[tuple[float, float, Verdict]]:
    """Mean squared error (of 8-bit values), SSIM and verdict of each picture."""
    out = []
    for picture, reference, case in zip(pictures, plain, cases, strict=True):
        error = float(((picture.astype(np.float64) - reference) ** 2).mean())
        out.append((error, float(structural_similarity(picture, reference, channel_axis=2)), judge(picture, *case)))
    return out


def psnr(error: float) -> float:
    """In dB for 8-bit pictures; pictures that are equal count as 100."""
    return 10 * float(np.log10(255**2 / max(error, 255**2 / 1e10)))


class Judges:
    """Processes that compare pictures while the next ones are drawn."""

    def __init__(self, cases: Sequence[Any]) -> None:
        _templates()  # before the fork: torch in a forked process may wait for threads that are not there
        self.cases = cases
        self.pool = ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("fork"))
        list(self.pool.map(abs, range(64)))  # the processes are there before CUDA is

    def submit(self, pictures: Sequence[np.ndarray], plain: Sequence[np.ndarray]) -> list[Any]:
        return [
            self.pool.submit(
                compare, np.stack(pictures[k : k + CHUNK]), np.stack(plain[k : k + CHUNK]), self.cases[k : k + CHUNK]
            )
            for k in range(0, len(pictures), CHUNK)
        ]


def gather(jobs: Sequence[Any]) -> dict[str, float]:
    errors, similarities, verdicts = zip(*itertools.chain.from_iterable(job.result() for job in jobs), strict=True)
    return {
        "psnr": psnr(statistics.fmean(errors)),
        "psnr_median": psnr(statistics.median(errors)),
        "ssim": statistics.fmean(similarities),
        **{name: value for name, value in rates(verdicts).items() if name != "background"},
    }


@torch.no_grad()
def step_seconds(transformer: Any, context: torch.Tensor, head: int) -> tuple[float, float]:
    """Median seconds of a computed and of a cached step at batch 1, through the cache itself."""
    cache = BlockCache(transformer, family_of_transformer(type(transformer).__name__).block_stacks, SINGLE)
    mask = (1, 1, *(0, 1) * 15)
    config = DBCacheConfig(
        Fn_compute_blocks=head, steps_computation_mask=mask, steps_computation_policy="static", max_warmup_steps=0
    )
    device, seconds = transformer.device, []
    for step in range(len(mask)):
        cache.plan(CacheSettings(config), Evaluation("run", "", float(step), len(mask)))
        began = time.perf_counter()
        transformer(
            hidden_states=torch.zeros(1, 256, 128, device=device),
            encoder_hidden_states=context,
            timestep=torch.full((1,), 0.5, device=device),
            guidance=torch.full((1,), GUIDANCE, device=device),
            img_ids=image_ids(16, 16, 0, device),
            txt_ids=text_ids(TEXT_LENGTH, device),
        )[0].sum().item()
        seconds.append((time.perf_counter() - began, mask[step]))
    cache.remove()
    warm = seconds[2:]
    return tuple(statistics.median(s for s, computed in warm if computed == kind) for kind in (1, 0))  # type: ignore[return-value]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw and compare everything."""
    cases = held_out(arguments.count)
    judges = Judges(cases)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    pipeline = Flux2Pipeline.from_pretrained(demo_folder(), torch_dtype=torch.float32).to(device)
    prompts = [caption.text for _, caption in cases]
    with torch.no_grad():
        context = torch.cat([comfy_context(pipeline, prompts[k : k + 50]) for k in range(0, len(prompts), 50)])
    times = {head: step_seconds(pipeline.transformer, context[:1], head) for head in arguments.fn}
    stacks = family_of_transformer(type(pipeline.transformer).__name__).block_stacks
    rows = CachedRows(pipeline.transformer, stacks)

    def draw(settings: CacheSettings | None, steps: int) -> list[np.ndarray]:
        rows.begin(settings, len(prompts), steps)
        return sample(pipeline, context, 256, 256, comfy_sigmas(steps), seed=1)

    began, jobs = time.perf_counter(), []
    for steps in arguments.steps:
        plain = draw(None, steps)
        jobs.append(({"steps": steps}, judges.submit(plain, plain)))
        for settings in all_settings(arguments):
            pictures = draw(settings, steps)
            config, computed = settings.config, statistics.fmean(rows.computed)
            head, cached = config.Fn_compute_blocks, steps - computed
            full, part = times[head]
            row = {
                "steps": steps,
                "Fn": head,
                "threshold": config.residual_diff_threshold,
                "taylorseer": settings.order,
                "warmup": config.max_warmup_steps,
                "computed_steps": computed,
                "blocks": (computed + cached * head / rows.blocks) / steps,
                "speedup": steps * full / (computed * full + cached * part),
            }
            jobs.append((row, judges.submit(pictures, plain)))
            print(f"[{time.perf_counter() - began:4.0f}] {row}", flush=True)
    table = [{**row, **gather(parts)} for row, parts in jobs]
    judges.pool.shutdown()
    return {
        "prompts": len(prompts),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "dtype": "TF32" if device == "cuda" else "fp32",
        "step_ms": {head: [1000 * second for second in pair] for head, pair in times.items()},
        "table": table,
    }


def all_settings(arguments: argparse.Namespace) -> Iterator[CacheSettings]:
    """Every combination that was asked for."""
    for warmup, head, order, threshold in itertools.product(
        arguments.warmup, arguments.fn, (0, 1), arguments.thresholds
    ):
        yield settings_of(threshold, head, order, warmup)


def to_markdown(report: dict[str, Any]) -> str:
    """The table, best PSNR first within a number of steps."""
    columns = ("steps", "Fn", "TaylorSeer", "threshold", "computed steps", "blocks", "speed-up", "PSNR", "SSIM",
               "things", "relations")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|" + "---:|" * len(columns)]
    for row in report["table"]:
        right = f"{row['present']:.1f} % | {row['relation']:.1f} % |"
        if "Fn" not in row:
            lines.append(f"| {row['steps']} | | | no cache | {row['steps']} | 100 % | 1.00 | | | {right}")
            continue
        lines.append(
            f"| {row['steps']} | {row['Fn']} | {row['taylorseer'] or ''} | {row['threshold']:g} | "
            f"{row['computed_steps']:.1f} | {100 * row['blocks']:.0f} % | {row['speedup']:.2f} | {row['psnr']:.1f} | "
            f"{row['ssim']:.3f} | {right}"
        )
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up against PSNR and against scenes that are right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row["steps"] for row in report["table"]})
    figure, axes = pyplot.subplots(2, len(lengths), figsize=(6 * len(lengths), 8), squeeze=False, sharex="col")
    for column, steps in enumerate(lengths):
        rows = [row for row in report["table"] if row["steps"] == steps]
        plain = next(row for row in rows if "Fn" not in row)
        lines: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in rows:
            if "Fn" in row:
                lines.setdefault((row["Fn"], row["taylorseer"]), []).append(row)
        for (head, order), points in lines.items():
            style = {
                "label": f"Fn {head}" + (", TaylorSeer" if order else ""),
                "color": {1: "C0", 4: "C1", 8: "C2"}.get(head, "C3"),
                "linestyle": "--" if order else "-",
                "marker": "o" if order else "s",
                "markersize": 4,
            }
            points = sorted(points, key=lambda row: row["threshold"])
            for axis, key in zip(axes[:, column], ("psnr", "relation"), strict=True):
                axis.plot([p["speedup"] for p in points], [p[key] for p in points], **style)
        axes[1, column].axhline(plain["relation"], color="grey", linewidth=1, label="no cache")
        axes[0, column].set_title(f"{steps} steps")
        axes[0, column].set_ylabel("PSNR against no cache (dB)")
        axes[1, column].set_ylabel("relations drawn right (%)")
        axes[1, column].set_xlabel("speed-up of sampling")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="files to write, without an ending")
    parser.add_argument("--redraw", action="store_true", help="table and plot from the JSON that is there")
    parser.add_argument("--count", type=int, default=200, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 50])
    parser.add_argument("--fn", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--warmup", type=int, nargs="+", default=[8])
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    arguments = parser.parse_args()
    data = arguments.out.with_suffix(".json")
    report = json.loads(data.read_text()) if arguments.redraw else measure(arguments)
    data.write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(to_markdown(report))
    plot(report, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
