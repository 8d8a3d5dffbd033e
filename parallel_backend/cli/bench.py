"""``bench``: what a step takes at a model's true shape with random weights, on real ranks or on rank 0 of any world."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bench.shapes import SHAPES, WEIGHTS, shape_of
from ..cache.config import parse_cache
from ..config import ParallelismConfig
from ..limits import threads_of_a_rank
from .speed import add_speed_arguments, speed_of

if TYPE_CHECKING:
    from ..bench.rank import Task

GIB = 2**30
SECONDS = 1800
"""That the ranks may take before they are ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--shape", choices=SHAPES, default="flux2-dev", help="of the model (default: %(default)s)")
    parser.add_argument("--ulysses", type=int, default=1, help="degree of Ulysses (default: 1)")
    parser.add_argument("--ring", type=int, default=1, help="degree of Ring (default: 1)")
    parser.add_argument("--tp", type=int, default=1, help="degree of tensor parallelism (default: 1)")
    parser.add_argument("--width", type=int, help="pixels (default: what suits the shape)")
    parser.add_argument("--height", type=int, help="pixels (default: what suits the shape)")
    parser.add_argument("--frames", type=int, help="of a video, 4 n + 1 (default: what suits the shape)")
    parser.add_argument("--text", type=int, help="tokens of a prompt (default: what suits the shape)")
    parser.add_argument("--steps", type=int, default=20, help="that are timed (default: %(default)s)")
    parser.add_argument("--blocks", type=int, help="of each kind, instead of the true depth")
    add_speed_arguments(parser)
    parser.add_argument("--cache", metavar="PRESET", help="have steps skip blocks, as for generate")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="what the blocks' linears are held as (default: as the rest)",
    )
    parser.add_argument(
        "--rank-only", action="store_true", help="rank 0 alone, with nothing in the place of the other ranks"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a summary; exit status 0."""
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        folder = arguments.json.resolve().parent
        raise ValueError(f"{arguments.json} cannot be written: the folder {folder} does not exist")
    task = make_task(arguments)
    print(f"{task.shape}, {task.layout.name}{', rank 0 alone' if task.rank_only else ''}: {describe(task)}", flush=True)
    report = {"hybrid_dit": __version__, "layout": task.layout.name, "task": asdict(task), **measure(task)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(render(report))
    return 0


def make_task(arguments: argparse.Namespace) -> Task:
    """What the ranks are asked for.

    Raises:
        ValueError: what cannot work, before a process is started.
    """
    layout = ParallelismConfig(arguments.ulysses, arguments.ring, arguments.tp)
    shape = shape_of(arguments.shape)
    if arguments.cache is not None:
        parse_cache(arguments.cache)
    if arguments.copy_engines and arguments.rank_only:
        raise ValueError("--copy-engines needs real ranks; leave it or --rank-only out")
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1; got {arguments.steps}")

    import torch

    from ..bench.model import transformer_config
    from ..bench.rank import Task
    from ..parallel.kitchen import has_kitchen

    count = torch.cuda.device_count()
    device = arguments.device if arguments.device != "auto" else ("cuda" if count else "cpu")
    if arguments.weights and not arguments.weights.startswith("fp8") and not has_kitchen():
        raise ValueError(f"weights in {arguments.weights} need comfy-kitchen: pip install comfy-kitchen")
    needed = 1 if arguments.rank_only else layout.world_size
    if device == "cuda" and count < needed:
        raise ValueError(
            f"{layout.name} needs {needed} GPU(s), this machine has {count}; lower the degrees, or give --rank-only "
            "(rank 0 alone, on one GPU) or --device cpu"
        )
    family, config = transformer_config(shape, arguments.blocks)
    kind = family.transformer
    full = dict(kind.build(config).config)
    kind.check_layout(full, layout)
    width, height = arguments.width or shape.side, arguments.height or shape.height or shape.side
    multiple, step, frames = kind.latent_look(full).multiple, kind.frame_downscale, arguments.frames or shape.frames
    if width < 1 or height < 1 or width % multiple or height % multiple:
        raise ValueError(f"width and height are multiples of {multiple} pixels; got {width} x {height}")
    if frames < 1 or (frames - 1) % (step or frames):
        takes = f"takes {step} n + 1 frames, such as {4 * step + 1}" if step else "takes a single picture"
        raise ValueError(f"{arguments.shape} {takes}; got --frames {frames}")
    return Task(
        shape=arguments.shape,
        ulysses=layout.ulysses_size,
        ring=layout.ring_size,
        tp=layout.tp_size,
        width=width,
        height=height,
        steps=arguments.steps,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        text=arguments.text or shape.text_tokens,
        frames=frames,
        blocks=arguments.blocks,
        **asdict(speed_of(arguments)),
        cache=arguments.cache,
        weights=arguments.weights or "",
        rank_only=arguments.rank_only,
    )


def measure(task: Task) -> dict[str, Any]:
    """Have ranks measure a task: their figures in rank order, and what they ran on.

    Raises:
        RuntimeError: a rank failed; with the end of what it said.
    """
    import torch

    ranks = 1 if task.rank_only else task.layout.world_size
    with tempfile.TemporaryDirectory(prefix="hybrid-dit-bench-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(asdict(task)))
        run_ranks(["-m", "parallel_backend.bench.rank", name], ranks, SECONDS)
        found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {"device": found[0]["device"], "torch": torch.__version__, "ranks": found}


def run_ranks(program: list[str], ranks: int, seconds: float) -> str:
    """Run a Python program on so many ranks, under torchrun where there are several; what it printed.

    Raises:
        RuntimeError: it failed, or took too long; with the end of what it said.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = dict(os.environ)
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(ranks)))
    process = subprocess.Popen(
        [sys.executable, *launcher, *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with _ended(process):
        try:
            out, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the ranks took more than {seconds:.0f} s and were ended") from None
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {_cause(said)}")
    return out


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Leaves nothing of a process's session behind."""
    try:
        yield
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _cause(said: str) -> str:
    """The line of a log that says what went wrong: the error a rank ended with, not torchrun's words on it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.partition(": ")[2] if line.startswith("[rank") else line for line in lines]
    errors = [line for line in errors if line.partition(":")[0].endswith(("Error", "Exception"))]
    own = [line for line in errors if not line.startswith("torch.distributed.elastic")]
    return (own or lines or ["nothing was said"])[-1][:500]


def describe(task: Task) -> str:
    """What is measured, in words."""
    parts = [f"{task.width} x {task.height}, {task.text} tokens of text", f"{task.dtype} on {task.device}"]
    parts += [f"{task.blocks} blocks of each kind"] if task.blocks else []
    parts += [f"weights in {task.weights}"] if task.weights else []
    parts += [task.speed.describe()]
    parts += [f"cache {task.cache}"] if task.cache else []
    return ", ".join(parts)


def render(report: dict[str, Any]) -> str:
    """The figures in a few lines; times are those of the slowest rank."""
    ranks = report["ranks"]
    slowest = max(ranks, key=lambda rank: rank["step"]["median"])
    step, profile = slowest["step"], ranks[0]["profile"]
    lines = [
        f"{report['device']}, torch {report['torch']}",
        f"step          {step['median']:.1f} ms ({step['least']:.1f} to {step['most']:.1f}, "
        f"{len(slowest['step_ms'])} steps)",
        f"text encoding {_optional(slowest['text_s'], '{:.3f} s')}",
        f"compiling     {_optional(slowest['compile_s'], '{:.1f} s')}",
    ]
    if slowest["cache"] is not None:
        cache = slowest["cache"]
        lines.append(
            f"cache         {cache['computed']} steps computed ({_optional(cache['computed_ms'], '{:.1f} ms')}), "
            f"{cache['cached']} cached ({_optional(cache['cached_ms'], '{:.1f} ms')})"
        )
    ms = profile["ms"]
    lines.append(
        f"rank 0        GEMM {ms['GEMM']:.1f}, attention {ms['attention']:.1f}, rest {ms['rest']:.1f}, communication "
        f"{profile['exposed_ms']:.1f} exposed + {profile['hidden_ms']:.1f} hidden, gaps {profile['gaps_ms']:.1f} ms; "
        f"{profile['count']} kernels"
    )
    for rank, figures in enumerate(ranks):
        weights, peaks = figures["weight_bytes"], figures["peak_bytes"]
        lines.append(
            f"rank {rank:<8} weights {_sizes(weights)}; peak {_sizes(peaks)} GiB; memory grew {figures['memory_grew']} "
            "times while steps were timed"
        )
    one = ranks[0].get("one_gpu")
    if one is not None:
        lines.append(
            f"one device    {one['note']}"
            if "note" in one
            else f"one device    {one['step']['median']:.1f} ms; relative error {one['error']:.2e}"
        )
    return "\n".join(lines)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in sizes.items())
