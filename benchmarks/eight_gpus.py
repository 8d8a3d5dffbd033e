"""The reference table on up to eight GPUs: FLUX.2-dev in every layout, ours against cache-dit 1.5.3, whole runs.

Random bf16 weights at the true shape, 1024 x 1024, text encoder included, compiled blocks, the same attention kernel on
both sides. A row is a layout, with or without a block cache whose mask both sides follow. Ranks are started once for a
side and a number of GPUs, and measure row after row, so that the whole table takes two or three calls of ten minutes;
what is in ``--json`` already is not measured again, and a row that failed is tried again. The error is that of a
prediction against the one of a single GPU with the same weights (not cache-dit's with TP, whose weights are others).
``benchmarks/eight_gpus.sh`` runs all of it; ``python benchmarks/eight_gpus.py --shape tiny --device cpu`` shows on gloo
ranks that every row computes what one rank does.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_cache_dit import OURS, PEER, begin_steps, cache_of, first_line, layout_of, measured
from benchmarks.cache_dit_peer import build_peer, build_peer_text_model, mend_peer
from parallel_backend.bench.model import build_text_model, build_transformer, make_inputs, transformer_config
from parallel_backend.bench.rank import WARMUP, Task, device_name
from parallel_backend.bench.shapes import SHAPES, shape_of
from parallel_backend.bench.timing import reset_peak, seconds_of, time_steps
from parallel_backend.cli.bench import run_ranks
from parallel_backend.families import Model
from parallel_backend.mesh import ParallelMesh, build_mesh
from parallel_backend.parallel import copies

GIB = 2**30
LAYOUTS = (
    "TP-2", "Ulysses-2", "Ring-2",
    "TP-4", "Ulysses-4", "Ring-4",
    "TP-8", "Ulysses-8", "Ring-8", "Ulysses-4-TP-2", "Ulysses-2-TP-4", "Ring-4-TP-2", "Ring-2-TP-4", "USP-2-2-TP-2",
)  # fmt: skip
WITH_CACHE = ("Ulysses-2-TP-4", "Ulysses-4-TP-2")
QWEN_LAYOUTS = ("Ulysses-4-TP-2", "Ulysses-8")
"""Qwen-Image's: the reference's, and the fastest by the cost model."""
SINGLE = "single"
MASKS = {
    28: "1111110110010010001001000101",
    50: "11111101100100100010010001000100100010010001000101",
}
"""Steps of a run -> which are computed where there is a cache."""
TEXT_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """A line of the table: a layout's name, and whether it runs with the block cache."""

    layout: str
    cached: bool = False

    @property
    def name(self) -> str:
        return self.layout + " + cache" * self.cached

    @property
    def ranks(self) -> int:
        return layout_of(self.layout).world_size


def rows_of(shape: str, most: int) -> list[Row]:
    """The lines for a shape on at most so many GPUs, one GPU first."""
    names = QWEN_LAYOUTS if shape == "qwen-image" else LAYOUTS
    cached = () if shape == "qwen-image" else WITH_CACHE
    rows = [Row(SINGLE), *map(Row, names), *(Row(name, True) for name in cached)]
    return [row for row in rows if row.ranks <= most]


class Ranks:
    """The ranks of one job, which measure row after row.

    Args:
        task: what all rows have in common.
        side: whose engine.
        attention: cache-dit's backend.
        runs: steps of the runs that are timed.
        folder: where a single GPU's prediction is, or is written.
    """

    def __init__(self, task: Task, side: str, attention: str, runs: Sequence[int], folder: Path) -> None:
        self.task, self.side, self.attention, self.runs, self.folder = task, side, attention, runs, folder

    @torch.no_grad()
    def measure(self, row: Row) -> dict[str, Any]:
        """Figures of this rank for a row."""
        layout = layout_of(row.layout)
        task = replace(self.task, ulysses=layout.ulysses_size, ring=layout.ring_size, tp=layout.tp_size)
        if row.cached:
            task = replace(task, cache=cache_of(MASKS[min(MASKS)]))
        figures: dict[str, Any] = {}
        reset_peak(task.device)
        mesh = build_mesh(layout, task.device, copies.usable(task.copy_engines))
        for part in (self._text, self._transformer):
            part(task, mesh, row, figures)
            clear(task.device)  # what it built is gone
        return figures

    def _text(self, task: Task, mesh: ParallelMesh, row: Row, figures: dict[str, Any]) -> None:
        """Encode a prompt a few times."""
        build: Callable[..., Any] = build_text_model if self.side == OURS else build_peer_text_model
        try:
            built = build(shape_of(task.shape), mesh, getattr(torch, task.dtype))
        except Exception as error:
            figures["note"] = f"text encoder: {first_line(error)}"
            return
        if built is None:
            return
        model, family, config = built
        kind = family.needs_text_encoder()
        ids = torch.arange(task.text, device=task.device)[None] % 1000
        encode = functools.partial(kind.encode, model, ids, torch.ones_like(ids), kind.layers(config))
        encode()
        figures["text_s"] = sorted(seconds_of(encode, task.device) for _ in range(TEXT_ROUNDS))[TEXT_ROUNDS // 2]

    def _transformer(self, task: Task, mesh: ParallelMesh, row: Row, figures: dict[str, Any]) -> None:
        shape, dtype = shape_of(task.shape), getattr(torch, task.dtype)
        family, _ = transformer_config(shape, task.blocks)
        x, inputs = make_inputs(shape, task.width, task.height, task.text, task.device, dtype)
        if self.side == OURS:
            model = build_transformer(shape, task.layout, mesh, dtype, task.blocks, task.speed)
        else:
            model = build_peer(task, self.attention, inputs, x, figures)

        def evaluate() -> torch.Tensor:
            if self.side == OURS:
                return family.transformer.evaluate(model, inputs, x)
            return family.transformer.prediction(model(**inputs, return_dict=False)[0], x)

        try:
            figures["first_step_s"] = seconds_of(evaluate, task.device)
        except RuntimeError as error:
            if self.side == OURS or task.tp == 1 or not mend_peer(model, model.config.attention_head_dim):
                raise
            figures["note"] = f"as it is it fails ({first_line(error)}); measured with attn.inner_dim mended"
            figures["first_step_s"] = seconds_of(evaluate, task.device)
        # A DTensor's values are drawn for its own part, which of fused weights is not a slice of the whole.
        if not row.cached and (self.side == OURS or task.tp == 1):
            figures["relative_error"] = self._compare(row, evaluate())
        for steps in self.runs:
            settings = replace(task, steps=steps, cache=cache_of(mask_of(steps)) if row.cached else None)
            self._run(settings, model, mesh, evaluate, figures)

    def _run(
        self,
        task: Task,
        model: Model,
        mesh: ParallelMesh,
        evaluate: Callable[[], torch.Tensor],
        figures: dict[str, Any],
    ) -> None:
        """Time a whole run, after another that warms up."""
        begin = begin_steps(task, self.side, model, mesh)

        def step(number: int) -> torch.Tensor:
            begin(number)
            return evaluate()

        for number in range(task.steps if task.cache else WARMUP):  # a cache has a run of its own to end
            out = step(number)
        figures["finite"] = torch.isfinite(out).all().item()
        timed = time_steps(step, task.steps, task.device)
        figures.setdefault("run_ms", {})[str(task.steps)] = timed.ms
        figures["peak_bytes"] = max(figures.get("peak_bytes", 0), timed.peak_bytes)

    def _compare(self, row: Row, prediction: torch.Tensor) -> float | None:
        """How far a prediction is from one GPU's, all values together; on rank 0."""
        file = self.folder / f"{self.task.shape}-{self.task.dtype}.pt"
        if row.layout == SINGLE and self.side == OURS:
            torch.save(prediction.cpu(), file)
        if not file.exists() or (dist.is_initialized() and dist.get_rank()):
            return None
        expected = torch.load(file, weights_only=True).to(prediction).float()
        return ((prediction.float() - expected).norm() / expected.norm()).item()


def mask_of(steps: int) -> str:
    """Which steps of a run are computed: those of `MASKS`, or a third of them after the first."""
    return MASKS.get(steps) or "".join("10"[number % 3 > 0] for number in range(steps - 1)) + "1"


def clear(device: str) -> None:
    """Leave nothing of a model behind for the next one."""
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    reset_peak(device)


def job(folder: Path) -> None:
    """One process of a job: what ``job.json`` says, row after row; rank 0 adds a line a row to ``rows.jsonl``."""
    said = json.loads((folder / "job.json").read_text())
    task, until = Task(**said["task"]), said["until"]
    start(task.device, said["ranks"])
    ranks = Ranks(task, said["side"], said["attention"], said["runs"], folder)
    first = not dist.is_initialized() or dist.get_rank() == 0
    for row in (Row(**row) for row in said["rows"]):
        late = torch.tensor(time.time() > until)
        if dist.is_initialized():
            dist.broadcast(late, 0)
        if late:
            break
        try:
            figures = ranks.measure(row)
        except Exception as error:
            figures = {"failed": first_line(error)}
        if first:
            figures |= {"device": device_name(task.device), "layout": row.layout, "cached": row.cached}
            with (folder / "rows.jsonl").open("a") as stream:
                stream.write(json.dumps(figures) + "\n")
        if "failed" in figures:
            sys.exit(1)  # the other ranks may wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


def start(device: str, ranks: int) -> None:
    """This process's place among so many."""
    if ranks == 1:
        return
    if device == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=own)
    else:
        dist.init_process_group("gloo")


def run_job(
    task: Task, side: str, rows: Sequence[Row], arguments: argparse.Namespace, until: float
) -> list[dict[str, Any]]:
    """Rows of one side that have the same number of GPUs, in processes of their own; those that there was time for."""
    folder = arguments.folder
    (folder / "rows.jsonl").unlink(missing_ok=True)
    said = {
        "task": vars(task), "side": side, "attention": arguments.peer_attention, "runs": arguments.runs, "until": until,
        "ranks": rows[0].ranks, "rows": [vars(row) for row in rows],
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(said))
    failure = ""
    try:
        run_ranks([__file__, "--job", str(folder)], rows[0].ranks, max(1.0, until - time.time()) + arguments.grace)
    except RuntimeError as error:
        failure = str(error)
    file = folder / "rows.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if failure and not any("failed" in row for row in found) and len(found) < len(rows):
        broken = rows[len(found)]
        found.append({"failed": failure, "layout": broken.layout, "cached": broken.cached})
    return [row | {"side": side} for row in found]


def seconds_of_run(row: dict[str, Any], steps: str) -> float:
    """Seconds of a whole run: the prompt, and its steps."""
    return row.get("text_s", 0.0) + sum(row["run_ms"][steps]) / 1000


def to_markdown(rows: Sequence[dict[str, Any]], wanted: Sequence[Row], runs: Sequence[int]) -> str:
    """A line a row: seconds of whole runs, ms a step of the longest, peak GiB of rank 0, error.

    Ratios are ours / peer; "x one GPU" is how many times as fast as our one GPU without a cache we are.
    """
    runs_of = [str(steps) for steps in runs]
    columns = [title for steps in runs_of for title in (f"{steps} steps, s: ours", PEER, "ratio")]
    titles = [
        "row",
        *columns,
        "ms a step: ours",
        PEER,
        "ratio",
        "x one GPU",
        "peak GiB: ours",
        PEER,
        "error: ours",
        PEER,
    ]
    titles += ["note"]
    lines = [f"| {' | '.join(titles)} |", "|---" * (len(titles)) + "|"]
    by = {(row["layout"], row["cached"], row["side"]): row for row in rows}
    alone = by.get((SINGLE, False, OURS), {})
    for row in wanted:
        ours, peer = (by.get((row.layout, row.cached, side), {}) for side in (OURS, PEER))
        cells, longest = [], runs_of[-1]
        for steps in runs_of:
            cells += pair(*(seconds_of_run(one, steps) if "run_ms" in one else None for one in (ours, peer)), "{:.2f}")
        step = [mean_ms(one, longest) for one in (ours, peer)]
        cells += pair(*step, "{:.1f}")
        base = mean_ms(alone, longest)
        cells.append(f"{base / step[0]:.2f}" if base and step[0] else "")
        cells += pair(*(one["peak_bytes"] / GIB if "peak_bytes" in one else None for one in (ours, peer)), "{:.2f}")[:2]
        cells += [
            f"{one['relative_error']:.1e}" if one.get("relative_error") is not None else "" for one in (ours, peer)
        ]
        notes = [
            f"{one['side']}: {one.get('failed') or one.get('note')}"
            for one in (ours, peer)
            if one.get("failed") or one.get("note")
        ]
        notes += [f"{one['side']}: values that are not finite" for one in (ours, peer) if one.get("finite") is False]
        lines.append("| " + " | ".join([row.name, *cells, "; ".join(notes).replace("\n", " ")]) + " |")
    return "\n".join(lines)


def mean_ms(row: dict[str, Any], steps: str) -> float | None:
    """Milliseconds of a step of a run, on average; None where it was not measured."""
    return sum(row["run_ms"][steps]) / len(row["run_ms"][steps]) if "run_ms" in row else None


def pair(ours: float | None, peer: float | None, form: str) -> list[str]:
    """Both sides' figures and the ratio, as cells; empty where one is not there."""
    ratio = f"{ours / peer:.3f}" if ours and peer else ""
    return [form.format(ours) if ours is not None else "", form.format(peer) if peer is not None else "", ratio]


def gpus(device: str, most: int) -> int:
    """How many ranks this machine has devices for."""
    return min(most, torch.cuda.device_count()) if device == "cuda" else most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="flux2-dev", help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", choices=(OURS, PEER), default=[OURS, PEER])
    parser.add_argument("--layouts", help="only these, by name; default: all that the GPUs suffice for")
    parser.add_argument("--gpus", type=int, default=8, help="at most so many (default: %(default)s)")
    parser.add_argument("--runs", type=int, nargs="+", default=sorted(MASKS), help="steps (default: %(default)s)")
    parser.add_argument("--side", type=int, help="pixels along a side; default: what suits the shape")
    parser.add_argument("--text", type=int, help="tokens of text, as --side")
    parser.add_argument("--blocks", type=int, help="of each kind instead of the true depth")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--no-copy-engines", action="store_true", help="exchange by NCCL on our side, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer-attention", default="_sdpa_cudnn", help="backend (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=86400.0, help="after which no other row is begun")
    parser.add_argument("--grace", type=float, default=120, help="seconds that a row may take after that")
    parser.add_argument("--json", type=Path, default=Path("eight_gpus.json"), help="default: %(default)s")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job(arguments.job)
        return
    began, shape = time.time(), shape_of(arguments.shape)
    task = Task(
        shape=arguments.shape, ulysses=1, ring=1, tp=1,
        width=arguments.side or shape.side, height=arguments.side or shape.side, steps=max(arguments.runs),
        device=arguments.device, dtype="bfloat16" if arguments.device == "cuda" else "float32",
        text=arguments.text or shape.text_tokens, blocks=arguments.blocks, compile=not arguments.eager,
        copy_engines=arguments.device == "cuda" and not arguments.no_copy_engines,
    )  # fmt: skip
    report = {"torch": torch.__version__, "task": vars(task), "runs": arguments.runs}
    try:
        rows = measured(arguments.json, report)
    except ValueError as error:
        parser.error(str(error))
    wanted = rows_of(arguments.shape, gpus(arguments.device, arguments.gpus))
    if arguments.layouts:
        names = {SINGLE, *(layout_of(name).name for name in arguments.layouts.split(","))}
        wanted = [row for row in wanted if row.layout in names]
    with tempfile.TemporaryDirectory(prefix="hybrid-dit-bench-") as name:
        arguments.folder = Path(name)
        measure_all(task, wanted, rows, arguments, report, began + arguments.seconds)
    machine = ", ".join(sorted({str(row["device"]) for row in rows if "device" in row}))
    print(f"\n{task.shape}, {task.width} x {task.height}, {task.text} tokens, {machine}, torch {report['torch']}")
    print(to_markdown(rows, wanted, arguments.runs))
    if any("failed" in row for row in rows):
        sys.exit(1)


def measure_all(
    task: Task, wanted: Sequence[Row], rows: list[dict[str, Any]], arguments: argparse.Namespace,
    report: dict[str, Any], until: float,
) -> None:  # fmt: skip
    """Add to the rows what is not there yet; the most GPUs first, after one, which all others are compared with."""
    for ranks in sorted({row.ranks for row in wanted}, key=lambda count: (count > 1, -count)):
        for side in arguments.sides:
            while time.time() < until:
                there = {(row["layout"], row["cached"]) for row in rows if row["side"] == side}
                left = [row for row in wanted if row.ranks == ranks and (row.layout, row.cached) not in there]
                alone = ranks == 1 and side == OURS
                if alone and len(rows) < len(arguments.sides) * len(wanted) and not any(arguments.folder.glob("*.pt")):
                    # What others are compared with is in this call's folder, so it is measured in each.
                    rows[:] = [row for row in rows if (row["layout"], row["side"]) != (SINGLE, OURS)]
                    left = [row for row in wanted if row.ranks == 1]
                if not left:
                    break
                found = run_job(task, side, left, arguments, until)
                rows += found
                for row in found:
                    print(json.dumps({key: value for key, value in row.items() if key != "run_ms"}), flush=True)
                # Each time, so that an interrupted run leaves what it has.
                arguments.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
                if not found:
                    return


if __name__ == "__main__":
    main()
