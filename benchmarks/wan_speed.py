"""Wan 2.2's 14B at its true width, 81 frames in 480p and 720p: ours against diffusers, and what one rank of many takes.

``python benchmarks/wan_speed.py [--blocks 8] [--json FILE]`` needs one GPU of 80 GB and a few minutes. It prints, as
they come,

* ms of an evaluation with compiled blocks, of ours and of diffusers' `WanTransformer3DModel` on the same inputs with
  the same attention kernel; ``x 40`` is the time of all 40 blocks, by that of ``--blocks`` and of half as many, which
  differ by blocks alone;
* decoding by Wan 2.1's VAE, whole and the part of rank 0 of 4;
* ms of rank 0 of 4 and of 8, with nothing in the place of the other ranks, so that exchanges cost a copy at most;
* memory: both experts whole in depth, text encoder and VAE on rank 0 of TP-2, in fp8, at 480p.

Weights are random. A process measures the rows that have one number of ranks; where a row fails the next has a new one.
What is in FILE is not measured again, but for what failed. ``--devices 0,1 --layout ulysses=2`` (or ``tp=2``, or
``cfg``: a prompt a GPU, predictions exchanged) measures steps on real ranks, of diffusers Ulysses and Ring alone, which
need GPUs. With ``cfg`` ms are half of what both evaluations take. ``--devices cpu --shape tiny`` shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_cache_dit import measured
from benchmarks.row_process import RowProcess
from benchmarks.wan_rows import DEPTH, MEMORY, SIDES, STEP, VAE, Row, Task, layout_of, of_ranks, rows_of
from parallel_backend.bench.rank import device_name
from parallel_backend.bench.timing import Spread
from parallel_backend.limits import threads_of_a_rank

GIB = 2**30


def in_ranks(task: Task, rows: Sequence[Row], devices: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Have new processes measure rows of one number of ranks: each as it comes."""
    with tempfile.TemporaryDirectory(prefix="wan-speed-") as name:
        job, out, log = (Path(name) / file for file in ("job.json", "rows.jsonl", "log"))
        job.write_text(json.dumps({"task": asdict(task), "rows": [asdict(row) for row in rows]}))
        ranks = 1 if rows[0].alone else rows[0].ranks
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(ranks)))
        if task.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = devices
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--ranks", str(job)]
        process = RowProcess(command, environment, out, log)
        yield from process.rows(seconds)
        if process.returncode is not None and not process.count:
            (said_last,) = process.last_lines(1) or ["nothing was said"]
            yield {**asdict(rows[0]), "failed": f"exit code {process.returncode}: {said_last[:300]}"}


def row_of(figures: Mapping[str, Any]) -> Row:
    return Row(**{name: figures[name] for name in Row.__dataclass_fields__})


def line_of(figures: Mapping[str, Any], found: Sequence[Mapping[str, Any]], blocks: int) -> str:
    """A row for people, with its ratios to rows that were measured before."""
    row = row_of(figures)
    alone = ", rank 0 alone" if row.alone and row.ranks > 1 else ""
    depth = f" {max(1, blocks // 2) if row.half else blocks} blocks" if row.what == STEP else ""
    name = f"{row.what} {row.size} {row.layout or 'whole'}{alone}, {row.side}{depth}:"
    if "failed" in figures:
        return f"{name} failed: {figures['failed']}"
    done = {row_of(one): one for one in found if "failed" not in one}
    peak = f"peak {figures['peak_bytes'] / GIB:.2f} GiB"
    if row.what == MEMORY:
        held = ", ".join(f"{part} {size / GIB:.2f}" for part, size in figures["held"].items())
        peaks = ", ".join(f"{part} {size / GIB:.2f}" for part, size in figures["peaks"].items())
        estimated = figures.get("estimated_bytes")
        expected = f"; estimated {estimated / GIB:.2f}" if estimated else ""
        return f"{name} {peak} of weights {held}; peaks: {peaks}{expected}"
    if row.what == VAE:
        whole = done.get(replace(row, layout=""))
        ratio = ""
        if whole and row.layout:
            time_ratio = figures["seconds"] / whole["seconds"]
            ratio = (
                f", {time_ratio:.3f} of one rank's time, {figures['peak_bytes'] / whole['peak_bytes']:.3f} of its peak"
            )
        return f"{name} {figures['seconds']:.2f} s, {peak}{ratio}"
    parts = [f"{Spread(**figures['ms'])} ms", f"{peak}, weights {figures['weight_bytes'] / GIB:.2f}"]
    median = figures["ms"]["median"]
    if row.half and (whole := done.get(replace(row, half=False))):
        parts.append(f"x {DEPTH} blocks: {extrapolated(whole['ms']['median'], median, blocks):.0f} ms")
    if row.side != SIDES[0] and (ours := done.get(replace(row, side=SIDES[0]))):
        parts.append(f"ours / diffusers {ours['ms']['median'] / median:.3f}")
    one = done.get(replace(row, layout="", alone=True))
    if row.layout and one:
        parts.append(f"{median / one['ms']['median']:.3f} of one rank's")
    parts += [f"first {figures['first_s']:.1f} s"] + ([] if figures["finite"] else ["NOT FINITE"])
    return f"{name} " + "; ".join(parts)


def extrapolated(ms: float, half_ms: float, blocks: int) -> float:
    """Of all blocks, by what so many of them take and what half as many do: the rest is there once."""
    fewer = max(1, blocks // 2)
    if fewer == blocks:
        return ms * DEPTH / blocks
    return ms + (DEPTH - blocks) * (ms - half_ms) / (blocks - fewer)


def run(arguments: argparse.Namespace) -> int:
    """Measure what a file has not yet; print a line for each row. 1 if any of them failed or is left."""
    cpu = arguments.devices == "cpu"
    if not cpu and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; give --devices cpu")
    if arguments.blocks < 1 or arguments.steps < 1:
        raise ValueError(f"--blocks and --steps are at least 1; got {arguments.blocks} and {arguments.steps}")
    named, needed = arguments.devices.split(","), layout_of(arguments.layout).world_size
    if not cpu and len(named) != needed:
        raise ValueError(f"{arguments.layout or 'one rank'} needs {needed} devices, --devices names {len(named)}")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"{arguments.json} cannot be written: its folder does not exist")
    task = Task(
        arguments.shape, arguments.blocks, arguments.steps, "cpu" if cpu else "cuda",
        arguments.attention or ("native" if cpu else "_native_cudnn"),
    )  # fmt: skip
    device = device_name(task.device)
    report = {"device": device, "torch": torch.__version__, "task": asdict(task)}
    found = measured(arguments.json, report)
    began = time.perf_counter()
    print(
        f"{device}, torch {torch.__version__}: Wan 2.2 14B{'' if task.shape == 'wan-14b' else ', ' + task.shape}, "
        f"{task.blocks} of {DEPTH} blocks, {task.dtype}, compiled, attention of diffusers: {task.attention}; "
        f"{', '.join(f'{name} {width} x {height} x {frames}' for name, (width, height, frames) in task.sizes.items())}",
        flush=True,
    )
    for one in found:
        print(line_of(one, found, task.blocks), "(measured before)", flush=True)
    tried = {row_of(one) for one in found}
    wanted = rows_of(arguments.layout)
    while left := [row for row in wanted if row not in tried]:
        rest = arguments.seconds - (time.perf_counter() - began)
        if rest <= 0:
            print(f"{arguments.seconds:.0f} s are over; a further run with --json measures what is left", flush=True)
            return 1
        together = [row for row in left if row.ranks == left[0].ranks]
        for one in in_ranks(task, together, arguments.devices, rest):
            if row_of(one) in tried:
                continue  # a rank that failed with another
            tried.add(row_of(one))
            found.append(one)
            print(f"{line_of(one, found, task.blocks)}; at {time.perf_counter() - began:.0f} s", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(report | {"rows": found}, indent=1) + "\n")
    return int(any("failed" in one for one in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("wan-14b", "tiny"), default="wan-14b", help="default: %(default)s")
    parser.add_argument("--devices", default="0", help="GPUs, one a rank, or cpu (default: %(default)s)")
    parser.add_argument("--layout", default="", help="ulysses=2, tp=2 or cfg, on real ranks (default: all of one GPU)")
    parser.add_argument("--blocks", type=int, default=8, help="of 40 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="that are timed (default: %(default)s)")
    parser.add_argument("--attention", help="diffusers' backend (default: _native_cudnn, on the CPU native)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which it ends with what it has")
    parser.add_argument("--json", type=Path, help="for the figures; what is in it already is not measured again")
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks:
        of_ranks(arguments.ranks)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its processes end with it
    try:
        raise SystemExit(run(arguments))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
