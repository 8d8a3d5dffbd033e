"""Step time and peak memory in any layout, ours against cache-dit 1.5.3, at a model's true shape.

Both sides run diffusers' module with random bf16 weights, on the same inputs, with cuDNN's attention, eager or with
compiled blocks. With ``--rank-only`` a process group stands in for the other ranks (`parallel_backend.bench.alone`):
shapes, weights, activations and compute of rank 0 are true, exchanges cost nothing but a copy, and one GPU is enough
for any layout; without it there is a rank on each GPU. With ``--mask`` both sides' block caches compute and skip the
same steps, whatever the numbers (their static policy), one block of a list being computed always. A side that fails is
reported, and the others go on. Each measurement is a process (or a torchrun job) of its own, since memory has to start
clean; the sides take turns. With ``--json`` a run goes on where an earlier one with the same arguments stopped.
``python benchmarks/against_cache_dit.py --shape flux2-dev --layouts Ulysses-2,TP-2 [--rank-only] [--compile]
[--json FILE]``; it needs ``pip install -e '.[bench]'`` and, for FLUX.2-dev, 80 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cache_dit_peer import build_peer, mend_peer, peer_cache
from parallel_backend.bench.model import (
    build_transformer,
    make_inputs,
    transformer_config,
    weight_bytes,
)
from parallel_backend.bench.profile import profile_step, shares
from parallel_backend.bench.rank import WARMUP, Task, begin_step, device_name, start_ranks
from parallel_backend.bench.shapes import SHAPES, shape_of
from parallel_backend.bench.timing import Spread, seconds_of, time_steps
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import parse_cache
from parallel_backend.cli.bench import run_ranks
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Model
from parallel_backend.mesh import ParallelMesh

OURS, PEER = "ours", "cache-dit"
GIB = 2**30


def layout_of(name: str) -> ParallelismConfig:
    """The layout that `ParallelismConfig.name` calls so."""
    match = re.fullmatch(r"(?:USP-(\d+)-(\d+)|Ulysses-(\d+)|Ring-(\d+))?-?(?:TP-(\d+))?|single", name)
    usp_ulysses, usp_ring, ulysses, ring, tp = (int(degree or 1) for degree in match.groups()) if match else (1,) * 5
    layout = ParallelismConfig(ulysses_size=usp_ulysses * ulysses, ring_size=usp_ring * ring, tp_size=tp)
    if match is None or layout.name != name:
        raise ValueError(f"{name!r} names no layout; names are like Ulysses-4, TP-2, USP-2-2-TP-2, single")
    return layout


@torch.no_grad()
def measure(task: Task, side: str, attention: str) -> dict[str, Any]:
    """Figures of this rank."""
    shape, dtype = shape_of(task.shape), getattr(torch, task.dtype)
    mesh = start_ranks(task)
    family, _ = transformer_config(shape, task.blocks)
    x, inputs = make_inputs(shape, task.width, task.height, task.text, task.device, dtype)
    figures: dict[str, Any] = {}
    began = time.perf_counter()
    if side == OURS:
        model = build_transformer(shape, task.layout, mesh, dtype, task.blocks, task.speed)
    else:
        model = build_peer(task, attention, inputs, x, figures)
    figures["build_s"] = time.perf_counter() - began
    figures["weight_bytes"] = weight_bytes(model)

    begin = begin_steps(task, side, model, mesh)

    def step(number: int = 0) -> torch.Tensor:
        begin(number)
        if side == OURS:
            return family.transformer.evaluate(model, inputs, x)
        return family.transformer.prediction(
            model(**inputs, return_dict=False)[0], x
        )  # without gradients, as in its pipelines

    try:
        figures["first_step_s"] = seconds_of(step, task.device)
    except RuntimeError as error:
        if side == OURS or task.tp == 1 or not mend_peer(model, model.config.attention_head_dim):
            raise
        figures["note"] = (
            figures.get("note", "") + f"; as it is it fails ({first_line(error)}); measured with attn.inner_dim mended"
        ).removeprefix("; ")
        figures["first_step_s"] = seconds_of(step, task.device)
    for _ in range(WARMUP):
        out = step()
    figures["finite"] = torch.isfinite(out).float().mean().item()
    timed = time_steps(step, task.steps, task.device)
    figures |= {"step_ms": timed.ms, "peak_bytes": timed.peak_bytes, "memory_grew": timed.grew}
    figures["profile"] = shares(profile_step(step, task.device), Spread.of(timed.ms).median)
    figures["device"] = device_name(task.device)
    return figures


def cache_of(mask: str) -> str:
    """A block cache, for `parse_cache`, that computes the steps that are 1 in a mask, and in all others one block."""
    return (
        f"steps_computation_mask={mask},steps_computation_policy=static,"
        "Fn_compute_blocks=1,Bn_compute_blocks=0,max_warmup_steps=1"
    )


def begin_steps(task: Task, side: str, model: Model, mesh: ParallelMesh) -> Callable[[int], None]:
    """What is to be called before a step: it tells the block cache, if there is one, the step's number in its run."""
    if task.cache is None:
        return lambda number: None
    settings = parse_cache(task.cache)
    if side == OURS:
        family, _ = transformer_config(shape_of(task.shape), task.blocks)
        cache = BlockCache(model, family.transformer.block_stacks, mesh.world)
        return lambda number: begin_step(cache, settings, number, task.steps)

    import cache_dit

    def begin_peer(number: int) -> None:
        if number == 0:
            cache_dit.refresh_context(model, cache_config=peer_cache(settings), verbose=False)

    return begin_peer


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '(nothing said)').splitlines()[0]}"


def one(folder: Path) -> None:
    """A rank of a measurement: what a JSON file in a folder says; rank 0 writes its figures there."""
    said = json.loads((folder / "task.json").read_text())
    task = Task(**said["task"])
    try:
        figures = measure(task, said["side"], said["attention"])
    except Exception as error:
        figures = {"error": first_line(error)}
    if not dist.is_initialized() or dist.get_rank() == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    if "error" in figures:
        sys.exit(1)  # the other ranks wait for this one
    if dist.is_initialized() and not task.rank_only:
        dist.destroy_process_group()


def in_process(task: Task, side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in processes of their own."""
    with tempfile.TemporaryDirectory(prefix="hybrid-dit-bench-") as name:
        folder = Path(name)
        said = {"task": vars(task), "side": side, "attention": arguments.peer_attention}
        (folder / "task.json").write_text(json.dumps(said))
        ranks = 1 if task.rank_only else task.layout.world_size
        failure = ""
        try:
            run_ranks([__file__, "--one", name], ranks, arguments.timeout)
        except RuntimeError as error:
            failure = str(error)
        figures = folder / "figures.json"
        return json.loads(figures.read_text()) if figures.exists() else {"error": failure}


def measured(file: Path | None, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier run of the same measurement left in a file; those that failed are not among them.

    Raises:
        ValueError: the file is of another measurement.
    """
    if file is None or not file.exists():
        return []
    found, report = json.loads(file.read_text()), json.loads(json.dumps(report))
    others = [name for name in report if found.get(name) != report[name]]
    if others:
        theirs, wanted = ({name: one.get(name) for name in others} for one in (found, report))
        raise ValueError(f"{file} is of another measurement ({theirs}, not {wanted}); name another file")
    return [row for row in found["rows"] if "error" not in row and "failed" not in row]


def of_mask(rows: Sequence[dict[str, Any]], mask: str) -> str:
    """Medians of the computed and of the cached steps of runs that followed a mask."""
    steps = [(kind, ms) for row in rows for kind, ms in zip(mask, row["step_ms"], strict=True)]
    return ", ".join(
        f"{mask.count(kind)} {name}: {statistics.median(ms for found, ms in steps if found == kind):.1f} ms"
        for kind, name in (("1", "computed"), ("0", "cached"))
    )


def to_markdown(rows: list[dict[str, Any]], mask: str | None = None) -> str:
    """A line a layout: medians over all rounds, spread from the fastest to the slowest step; ratios are ours / peer.

    With a cache, a step's time is the mean of a run's, and the note has the medians of computed and cached steps.

    Where the kernels' sum is far below the step, the host held the step up. Kernels run a little faster on numbers that
    are not finite, which the exchanges that move nothing can leave.
    """
    lines = [
        "| layout | side | step ms (spread) | kernels: GEMM + attention + communication + rest = ms | of them "
        "| exposed communication ms | gaps ms | weights GiB | peak GiB | first step s | note |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for layout in dict.fromkeys(row["layout"] for row in rows):
        medians, kernels, peaks = {}, {}, {}
        for side in dict.fromkeys(row["side"] for row in rows):
            found = [row for row in rows if (row["layout"], row["side"]) == (layout, side)]
            good = [row for row in found if "step_ms" in row]
            if not good:
                said = found[-1]["error"] if found else "not run"
                lines.append(f"| {layout} | {side} | | | | | | | | | {said} |".replace("\n", " "))
                continue
            spread = Spread.of([ms for row in good for ms in row["step_ms"]])
            last, profile = good[-1], good[-1]["profile"]
            medians[side], peaks[side] = spread.median, max(row["peak_bytes"] for row in good)
            kernels[side] = sum(profile["ms"].values())
            parts = " + ".join(f"{profile['ms'][kind]:.1f}" for kind in ("GEMM", "attention", "communication", "rest"))
            note = last.get("note", "") + ("" if last["finite"] == 1 else f" {last['finite']:.2f} of values finite")
            said = str(spread)
            if mask:
                medians[side] = statistics.mean(ms for row in good for ms in row["step_ms"])
                said, note = f"{medians[side]:.1f}", f"{note} {of_mask(good, mask)}"
            lines.append(
                f"| {layout} | {side} | {said} | {parts} = {kernels[side]:.1f} | {profile['count']} | "
                f"{profile['exposed_ms']:.1f} | {profile['gaps_ms']:.1f} | {last['weight_bytes'] / GIB:.2f} | "
                f"{peaks[side] / GIB:.2f} | {last['first_step_s']:.1f} | {note.strip()} |"
            )
        if len(medians) == 2:
            ratios = [ours[OURS] / ours[PEER] for ours in (medians, kernels, peaks)]
            lines.append(
                f"| {layout} | ratio | {ratios[0]:.3f} | {ratios[1]:.3f} | | | | | {ratios[2]:.3f} | | ours / {PEER} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="flux2-dev", help="default: %(default)s")
    parser.add_argument("--layouts", default="Ulysses-2,TP-2", help="default: %(default)s")
    parser.add_argument("--sides", default=f"{OURS},{PEER}", help="default: %(default)s")
    parser.add_argument("--width", type=int, help="default: what suits the shape")
    parser.add_argument("--height", type=int, help="as --width")
    parser.add_argument("--text", type=int, help="tokens of text, as --width")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1, help="processes a side; which side goes first alternates")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, on both sides")
    parser.add_argument("--cuda-graphs", action="store_true", help="run all blocks as one CUDA graph, on our side")
    parser.add_argument("--copy-engines", action="store_true", help="exchange by the GPUs' copy engines, on our side")
    parser.add_argument("--mask", help="1 for each step that is computed, 0 for each that is cached, on both sides")
    parser.add_argument("--rank-only", action="store_true", help="rank 0 alone, on one GPU")
    parser.add_argument("--blocks", type=int, help="of each kind instead of the true depth")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer-attention", default="_sdpa_cudnn", help="backend (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a process may take (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no other measurement is begun")
    parser.add_argument("--json", type=Path, help="for the figures; what is in it already is not measured again")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    if arguments.mask and not re.fullmatch("1(?=.*1)(?=.*0)[01]+", arguments.mask):
        parser.error(f"--mask {arguments.mask}: it wants ones and zeros, both, the first a 1; such as 110010001")
    shape = shape_of(arguments.shape)
    sides = arguments.sides.split(",")
    task = Task(
        shape=arguments.shape,
        ulysses=1,
        ring=1,
        tp=1,
        width=arguments.width or shape.side,
        height=arguments.height or shape.side,
        steps=len(arguments.mask) if arguments.mask else arguments.steps,
        device=arguments.device,
        dtype="bfloat16" if arguments.device == "cuda" else "float32",
        text=arguments.text or shape.text_tokens,
        blocks=arguments.blocks,
        compile=arguments.compile,
        cuda_graphs=arguments.cuda_graphs,
        copy_engines=arguments.copy_engines,
        cache=cache_of(arguments.mask) if arguments.mask else None,
        rank_only=arguments.rank_only,
    )
    report = {"device": device_name(arguments.device), "torch": torch.__version__, "task": vars(task)}
    try:
        rows = measured(arguments.json, report)
    except ValueError as error:
        parser.error(str(error))
    layouts = [layout_of(name) for name in arguments.layouts.split(",")]
    began = time.perf_counter()
    for turn, (index, layout) in itertools.product(range(arguments.rounds), enumerate(layouts)):
        job = replace(task, ulysses=layout.ulysses_size, ring=layout.ring_size, tp=layout.tp_size)
        for side in sides if (turn + index) % 2 == 0 else sides[::-1]:
            key = {"layout": layout.name, "side": side, "turn": turn}
            if any(key.items() <= row.items() for row in rows) or time.perf_counter() - began > arguments.seconds:
                continue
            row = key | in_process(job, side, arguments)
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k not in ("profile", "step_ms")}), flush=True)
            if arguments.json:  # each time, so that an interrupted run leaves what it has
                arguments.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    how = task.speed.describe() + ", rank 0 alone" * task.rank_only
    how += f", steps {arguments.mask}" if arguments.mask else ""
    print(f"\n{task.shape}, {task.width} x {task.height}, {task.text} tokens of text, {how}, {report['device']}")
    print(to_markdown(rows, arguments.mask))


if __name__ == "__main__":
    main()
