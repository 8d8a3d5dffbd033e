"""A step of FLUX.2-dev's shape, and a prompt of Mistral's, in each number format of weights, against bf16.

``python benchmarks/quantized_speed.py [--devices 0] [--depth-fraction 0.25] [--json FILE]`` prints a line for each: ms
eager and compiled, the ratio to bf16, and the device memory at its highest. Weights are random, of the true width; a
part of the depth has the ratios of all of it, as blocks are alike. One process (a GPU) measures one row after the
other; where a row fails the next has a new one. What is in FILE is not measured again, but for what failed.

``--devices 0,1 --ulysses 2`` (or ``--tp 2``, ``--ring 2``) measures on real ranks. ``--profile int8_convrot`` prints
the longest kernels of a step in that format by name. ``--shape tiny --devices cpu`` is to see that it runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_cache_dit import measured
from benchmarks.row_process import RowProcess
from parallel_backend.bench.model import (
    build_text_model,
    build_transformer,
    make_inputs,
    transformer_config,
    weight_bytes,
)
from parallel_backend.bench.profile import profile_step, shares
from parallel_backend.bench.rank import Task, device_name, start_ranks
from parallel_backend.bench.shapes import SHAPES, WEIGHTS, Shape, shape_of
from parallel_backend.bench.timing import Spread, seconds_of, time_steps
from parallel_backend.config import ParallelismConfig, Speed
from parallel_backend.families import family_of_transformer
from parallel_backend.parallel.products import Multiplier, product_of

GIB = 2**30
WARMUP = 2
LONGEST = 15
TRANSFORMER, TEXT = "transformer", "text encoder"
ORDER = ("fp8 as storage", "fp8", "int8_convrot", "int8")
HOWS = ("eager", "compiled")
BASE = "bf16"
"""As the rest of the model: fp32 on the CPU."""


def rows_of(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """What is measured, what needs no compiler first."""
    hows = _listed(arguments.how, HOWS)
    if arguments.profile:
        of = [(TRANSFORMER, arguments.profile, how) for how in hows]
        return [{"model": model, "weights": weights, "how": f"{how}, profiled"} for model, weights, how in of]
    formats = [BASE, *_listed(arguments.weights, WEIGHTS)]
    of_text = [BASE, *texts] if (texts := _listed(arguments.text_weights, WEIGHTS)) else []
    found = [(TRANSFORMER, weights, "eager") for weights in formats if "eager" in hows]
    found += [(TEXT, weights, "eager") for weights in of_text]
    found += [(TRANSFORMER, weights, "compiled") for weights in formats if "compiled" in hows]
    return [{"model": model, "weights": weights, "how": how} for model, weights, how in found]


def _listed(text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no {name!r} to measure; there are: {', '.join(known)}")
    return names


def shallower(shape: Shape, fraction: float) -> Shape:
    """A shape with part of its blocks, and of the layers of its text encoder."""
    family, config = transformer_config(shape)
    config = dict(family.transformer.build(config).config)
    depths = {name: max(1, round(config[name] * fraction)) for name in shape.depths}
    text = shape.text_config
    if text is not None:
        full = dict(text or family.reference_model.text_config)
        layers = family.needs_text_encoder().layers(full)
        text = full | {"text_encoder_out_layers": sorted({max(1, round(layer * fraction)) for layer in layers})}
    return replace(shape, config=dict(shape.config) | depths, text_config=text)


def line_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for people, with its ratio to bf16 where that was measured."""
    name = f"{row['model']:<13} {row['weights']:<15} {row['how']:<9}"
    if "failed" in row:
        return f"{name} failed: {row['failed']}"
    base = [one for one in rows if "ms" in one and one["weights"] == BASE]
    same = [one for one in base if (one["model"], one["how"]) == (row["model"], row["how"])]
    ratio = f"{row['ms']['median'] / same[0]['ms']['median']:.3f} x {BASE}" if same else ""
    spread = Spread(**row["ms"])
    return (
        f"{name} {spread} ms  {ratio:<12} peak {row['peak_bytes'] / GIB:.2f} GiB, weights "
        f"{row['weight_bytes'] / GIB:.2f}; {row['held']}; first {row['first_s']:.1f} s"
    )


@torch.no_grad()
def measure(row: Mapping[str, str], task: Task, shape: Shape, mesh: Any) -> dict[str, Any]:
    """A row's figures on this rank."""
    weights = "" if row["weights"] == BASE else row["weights"]
    dtype = getattr(torch, task.dtype)
    work: Callable[[], Any]
    if row["model"] == TEXT:
        built = build_text_model(shape, mesh, dtype, weights)
        if built is None:
            raise ValueError(f"there is no text encoder of the shape {task.shape}")
        model, family, config = built
        kind = family.needs_text_encoder()
        ids = torch.arange(task.text, device=task.device)[None] % 1000
        work = functools.partial(kind.encode, model, ids, torch.ones_like(ids), kind.layers(config))
    else:
        speed = Speed(compile=row["how"].startswith("compiled"))
        model = build_transformer(shape, task.layout, mesh, dtype, None, speed, weights)
        transformer = family_of_transformer(shape.transformer).transformer
        x, inputs = make_inputs(shape, task.width, task.height, task.text, task.device, dtype)
        work = functools.partial(transformer.evaluate, model, inputs, x)
    work = torch.inference_mode()(work)  # as ranks do
    figures: dict[str, Any] = {"weight_bytes": weight_bytes(model), "held": held_as(model)}
    figures["first_s"] = seconds_of(work, task.device)
    for _ in range(WARMUP):
        work()
    timed = time_steps(lambda _: work(), task.steps, task.device)
    figures |= {"ms": Spread.of(timed.ms).to_dict(), "peak_bytes": timed.peak_bytes, "memory_grew": timed.grew}
    if row["how"].endswith("profiled"):
        ran = profile_step(work, task.device)
        figures["shares"] = shares(ran, figures["ms"]["median"])
        sums: dict[str, list[float]] = defaultdict(list)
        for one in ran:
            sums[one.name].append(one.end - one.start)
        longest = sorted(((sum(times), len(times), name) for name, times in sums.items()), reverse=True)
        figures["kernels"] = longest[:LONGEST]
    return figures


def held_as(model: torch.nn.Module) -> str:
    """What a model's linears are held as and how they are multiplied."""
    counts: dict[str, int] = defaultdict(int)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Multiplier):
            counts[product_of(module).title] += 1
    return ", ".join(f"{count} {title}" for title, count in counts.items())


def of_ranks(arguments: argparse.Namespace) -> None:
    """Measure rows on this rank, one after the other; the process ends with the first that fails."""
    job = json.loads(arguments.ranks.read_text())
    task = Task(**job["task"])
    shape = shallower(shape_of(task.shape), job["depth_fraction"])
    mesh = start_ranks(task)
    out = arguments.ranks.with_name(f"{arguments.ranks.stem}-rows.jsonl")
    for row in job["rows"]:
        try:
            figures = measure(row, task, shape, mesh)
        except Exception as error:  # whatever a row fails with, the others are measured
            figures = {"failed": f"{type(error).__name__}: {error}"[:500], "rank": mesh.world.rank}
        if mesh.world.rank == 0 or "failed" in figures:
            with out.open("a") as file:
                file.write(json.dumps(row | figures) + "\n")
        if "failed" in figures:
            os._exit(1)  # ranks that wait for this one are ended by torchrun
        gc.collect()
        torch.compiler.reset()
        if task.device == "cuda":
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


def in_ranks(
    arguments: argparse.Namespace, task: Task, rows: Sequence[Mapping[str, str]], seconds: float, tell: Any
) -> int:
    """Have new processes measure rows; each is told of as it comes. How many came."""
    with tempfile.TemporaryDirectory(prefix="quantized-speed-") as name:
        job = Path(name) / "job.json"
        job.write_text(json.dumps({"task": vars(task), "depth_fraction": arguments.depth_fraction, "rows": list(rows)}))
        ranks = task.layout.world_size
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = dict(os.environ)
        if task.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = arguments.devices
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--ranks", str(job)]
        process = RowProcess(command, environment, job.with_name("job-rows.jsonl"), job.with_name("log"))
        for row in process.rows(seconds):
            tell(row)
        if process.returncode is None:
            print(f"{seconds:.0f} s are over; what is left is measured by a further run with --json")
        elif not process.count:
            print("\n".join(process.last_lines(20)), file=sys.stderr)
        return process.count


def task_of(arguments: argparse.Namespace) -> Task:
    """What is asked for; ValueError for what cannot be."""
    shape = shape_of(arguments.shape)
    cpu = arguments.devices == "cpu"
    layout = ParallelismConfig(arguments.ulysses, arguments.ring, arguments.tp)
    named = [name for name in arguments.devices.split(",") if name]
    if not cpu and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; give --devices cpu")
    if not cpu and len(named) != layout.world_size:
        raise ValueError(f"{layout.name} needs {layout.world_size} devices, --devices names {len(named)}")
    if not 0 < arguments.depth_fraction <= 1:
        raise ValueError(f"--depth-fraction must be above 0 and at most 1; got {arguments.depth_fraction}")
    if arguments.profile and arguments.profile not in (BASE, *WEIGHTS):
        raise ValueError(f"--profile takes one of {BASE}, {', '.join(WEIGHTS)}; got {arguments.profile!r}")
    return Task(
        shape=arguments.shape,
        ulysses=arguments.ulysses,
        ring=arguments.ring,
        tp=arguments.tp,
        width=arguments.width or shape.side,
        height=arguments.height or arguments.width or shape.height or shape.side,
        steps=arguments.steps,
        device="cpu" if cpu else "cuda",
        dtype="float32" if cpu else "bfloat16",
        text=arguments.text or shape.text_tokens,
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure what a file has not yet; print a line for each row. 1 if any of them failed."""
    task, wanted = task_of(arguments), rows_of(arguments)
    report = {
        "device": device_name(task.device),
        "torch": torch.__version__,
        "depth_fraction": arguments.depth_fraction,
        "task": vars(task),
    }
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise ValueError(f"{arguments.json} cannot be written: its folder does not exist")
    rows = measured(arguments.json, report)
    began = time.perf_counter()
    print(
        f"{report['device']}, torch {torch.__version__}: {task.shape}, {task.layout.name}, "
        f"{task.width} x {task.height}, {task.text} tokens of text, "
        f"{arguments.depth_fraction:g} of the depth, {task.steps} steps",
        flush=True,
    )

    def is_of(key: Mapping[str, str], row: Mapping[str, Any]) -> bool:
        return key.items() <= row.items()

    for row in rows:
        print(line_of(row, rows), "(measured before)", flush=True)

    def tell(row: dict[str, Any]) -> None:
        if any(is_of({key: row[key] for key in ("model", "weights", "how")}, one) for one in rows):
            return  # a rank that failed with another
        rows.append(row)
        print(f"{line_of(row, rows)}; at {time.perf_counter() - began:.0f} s", flush=True)
        for ms, count, name in row.get("kernels", []):
            print(f"    {ms:9.3f} ms {count:5} x {name[:150]}", flush=True)
        if "shares" in row:
            kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["shares"]["ms"].items())
            print(f"    {kinds}; gaps {row['shares']['gaps_ms']:.1f} ms; {row['shares']['count']} kernels", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")

    started = False
    while left := [key for key in wanted if not any(is_of(key, row) for row in rows)]:
        remaining = arguments.seconds - (time.perf_counter() - began)
        if remaining <= 0:
            break
        if in_ranks(arguments, task, left, remaining, tell):
            started = True
        elif started and time.perf_counter() - began < arguments.seconds:
            tell(left[0] | {"failed": "its process ended without a word"})
        else:
            break  # there is nothing to be had from processes like these
    missing = len([key for key in wanted if not any(is_of(key, row) and "failed" not in row for row in rows)])
    print(f"{len(wanted) - missing} of {len(wanted)} rows in {time.perf_counter() - began:.0f} s", flush=True)
    return 1 if missing else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="flux2-dev", help="default: %(default)s")
    parser.add_argument("--devices", default="0", help="numbers of GPUs, one a rank, or cpu (default: %(default)s)")
    for axis in ("ulysses", "ring", "tp"):
        parser.add_argument(f"--{axis}", type=int, default=1, help="degree (default: 1)")
    parser.add_argument("--weights", default=",".join(ORDER), help="of the transformer (default: %(default)s)")
    parser.add_argument("--text-weights", default="nvfp4", help="of the text encoder (default: %(default)s)")
    parser.add_argument("--how", default=",".join(HOWS), help="of the transformer (default: %(default)s)")
    parser.add_argument("--width", type=int, help="pixels (default: what suits the shape)")
    parser.add_argument("--height", type=int, help="pixels (default: the width)")
    parser.add_argument("--text", type=int, help="tokens of a prompt (default: what suits the shape)")
    parser.add_argument("--depth-fraction", type=float, default=1.0, help="of the blocks (default: all)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed (default: %(default)s)")
    parser.add_argument("--profile", metavar="WEIGHTS", help="print the longest kernels of a step in this format")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which it ends with what it has")
    parser.add_argument("--json", type=Path, help="for the figures; what is in it already is not measured again")
    parser.add_argument("--ranks", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks:
        of_ranks(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its processes end with it
    try:
        raise SystemExit(run(arguments))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
