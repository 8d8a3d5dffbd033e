"""What `wan_speed.py` measures, row by row, on a rank."""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_backend.bench.alone import start_alone
from parallel_backend.bench.model import build_text_model, build_transformer, fill, make_inputs, weight_bytes
from parallel_backend.bench.shapes import Shape, shape_of
from parallel_backend.bench.timing import Spread, peak_bytes, reset_peak, seconds_of, time_steps
from parallel_backend.config import ParallelismConfig, Speed
from parallel_backend.families import family_of_name
from parallel_backend.mesh import Axis, ParallelMesh, build_mesh, single_mesh
from parallel_backend.planning.memory import reference_memory

DEPTH = 40
SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}
SMALL = {"480p": (96, 64, 9), "720p": (128, 80, 9)}
"""On the CPU."""
SIDES = ("ours", "diffusers")
STEP, VAE, MEMORY = "step", "VAE decode", "memory"
WARMUP = 2
CFG = "cfg"
OF_FOUR = "rank 0 of 4"
"""Decoding, whichever layout the four have."""
WAN = family_of_name("wan")
TINY = {"num_attention_heads": 8, "attention_head_dim": 16, "ffn_dim": 256, "text_dim": 64, "freq_dim": 64}
TINY_TEXT = {"vocab_size": 1024, "d_model": 64, "d_kv": 8, "d_ff": 128, "num_layers": 2, "num_heads": 8}


@dataclass(frozen=True)
class Row:
    """What is measured.

    Args:
        what: a step, decoding, or memory.
        size: of `SIZES`.
        layout: degrees as `layout_of` reads them, or `OF_FOUR`; "" for one rank.
        alone: whether nothing is in the place of the other ranks.
        side: whose.
        half: whether with half of the blocks.
    """

    what: str
    size: str
    layout: str = ""
    alone: bool = True
    side: str = "ours"
    half: bool = False

    @property
    def ranks(self) -> int:
        """Of the process group: decoding for others that are not there needs none."""
        return 1 if self.what == VAE else layout_of(self.layout).world_size


def layout_of(name: str) -> ParallelismConfig:
    """``ulysses=2``, ``tp=2,ulysses=2``; ``cfg`` is two ranks with nothing in common but their group."""
    if name == CFG:
        return ParallelismConfig(ulysses_size=2)
    degrees: dict[str, int] = {}
    for part in filter(None, name.split(",")):
        axis, _, degree = part.partition("=")
        if axis not in ("ulysses", "ring", "tp") or not degree.isdecimal():
            raise ValueError(f"a layout is like ulysses=2, tp=2, ulysses=2,tp=2 or {CFG}; got {name!r}")
        degrees[f"{axis}_size"] = int(degree)
    return ParallelismConfig(**degrees)


def rows_of(layout: str) -> list[Row]:
    """What is measured: what matters most first, rows of one number of ranks together."""
    if layout:
        sides = ("ours", "diffusers") if layout_of(layout).tp_size == 1 and layout != CFG else ("ours",)
        one = [Row(STEP, size) for size in SIZES]
        return one + [Row(STEP, size, layout, False, side) for side in sides for size in SIZES]
    rows = [Row(STEP, size, side=side, half=half) for side in SIDES for half in (False, True) for size in SIZES]
    rows += [Row(VAE, size) for size in SIZES]
    rows += [Row(VAE, size, OF_FOUR) for size in SIZES]
    rows += [Row(STEP, size, f"{axis}=4") for axis in ("ulysses", "tp") for size in SIZES]
    rows += [Row(MEMORY, "480p", "tp=2")]
    return rows + [Row(STEP, size, f"{axis}=8") for axis in ("ulysses", "tp") for size in SIZES]


@dataclass(frozen=True)
class Task:
    """What all rows have in common."""

    shape: str
    blocks: int
    steps: int
    device: str
    attention: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def sizes(self) -> Mapping[str, tuple[int, int, int]]:
        return SMALL if self.shape == "tiny" else SIZES

    def model(self, blocks: int) -> Shape:
        shape = shape_of("wan-14b")
        small = self.shape == "tiny"
        config = dict(shape.config) | (TINY if small else {}) | {"num_layers": blocks}
        text = dict(WAN.reference_model.text_config) | (TINY_TEXT if small else {})
        features = config.get("text_dim", shape.features)
        return replace(shape, config=config, features=features, text_config=text)


class Ranks:
    """This rank, measuring row after row; a model is kept for the next size."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._model: tuple[Any, Any] = (None, None)

    def measure(self, row: Row) -> dict[str, Any]:
        """Figures of a row on this rank."""
        reset_peak(self.task.device)
        return {STEP: self._step, VAE: self._decode, MEMORY: self._memory}[row.what](row)

    def forget(self) -> None:
        """Give back what the rows before have left."""
        self._model = (None, None)
        gc.collect()
        reset_peak(self.task.device)

    def _mesh(self, row: Row) -> ParallelMesh:
        layout = layout_of(row.layout)
        if row.layout == CFG or layout.world_size == 1:
            return single_mesh(self.task.device)
        return build_mesh(layout, self.task.device)

    def _shape(self, row: Row) -> Shape:
        return self.task.model(max(1, self.task.blocks // 2) if row.half else self.task.blocks)

    def _step(self, row: Row) -> dict[str, Any]:
        task, shape = self.task, self._shape(row)
        key = row.side, row.layout, row.half
        if self._model[0] != key:
            if self._model[0] is None or self._model[0][:2] != key[:2]:
                torch.compiler.reset()
            self.forget()
            build = self._ours if row.side == "ours" else self._theirs
            self._model = (key, build(row, shape))
        elif row.side != "ours":
            torch.compiler.reset()  # each size has a graph of its own, the best that diffusers can have
        model = self._model[1]
        x, inputs = self._inputs(shape, row.size)
        if row.side == "ours":
            evaluate: Callable[[], Tensor] = functools.partial(WAN.transformer.evaluate, model, inputs, x)
        else:
            given = {name: value for name, value in inputs.items() if value is not None and name != "attention_kwargs"}

            def evaluate() -> Tensor:
                return model(**given, return_dict=False)[0]

        work = evaluate
        if row.layout == CFG:
            both = x.new_empty(2 * len(x), *x.shape[1:])

            def work() -> Tensor:
                dist.all_gather_into_tensor(both, evaluate().contiguous())
                return both

        work = torch.inference_mode()(work) if row.side == "ours" else torch.no_grad()(work)
        first = seconds_of(work, task.device)
        for _ in range(WARMUP):
            out = work()
        finite = bool(torch.isfinite(out).all())
        del out
        timed = time_steps(lambda _: work(), task.steps, task.device)
        ms = [one / 2 for one in timed.ms] if row.layout == CFG else timed.ms
        return {
            "ms": Spread.of(ms).to_dict(),
            "peak_bytes": timed.peak_bytes,
            "weight_bytes": weight_bytes(model),
            "first_s": first,
            "finite": finite,
        }

    def _inputs(self, shape: Shape, size: str) -> tuple[Tensor, dict[str, Any]]:
        width, height, frames = self.task.sizes[size]
        return make_inputs(shape, width, height, shape.text_tokens, self.task.device, self.task.dtype, frames)

    def _ours(self, row: Row, shape: Shape) -> Any:
        layout = ParallelismConfig() if row.layout == CFG else layout_of(row.layout)
        return build_transformer(shape, layout, self._mesh(row), self.task.dtype, None, Speed(compile=True))

    def _theirs(self, row: Row, shape: Shape) -> Any:
        model = WAN.transformer.build({**WAN.reference_model.transformer_config, **shape.config})
        fill(model, torch.device(self.task.device), self.task.dtype)
        model.set_attention_backend(self.task.attention)
        layout = layout_of(row.layout)
        if layout.world_size > 1:
            from diffusers import ContextParallelConfig

            degrees = ContextParallelConfig(ulysses_degree=layout.ulysses_size, ring_degree=layout.ring_size)
            model.enable_parallelism(config=degrees)
        model.compile_repeated_blocks()
        return model

    @torch.inference_mode()
    def _decode(self, row: Row) -> dict[str, Any]:
        if self._model[0] != VAE:
            self.forget()
            self._model = (VAE, self._vae())
        vae = self._model[1]
        run = functools.partial(self._decoded, vae, 4 if row.layout else 1, row.size)
        run(2)  # sets up convolutions, and keeps the first frames as all later pieces do
        reset_peak(self.task.device)
        seconds = seconds_of(run, self.task.device)
        return {
            "seconds": seconds,
            "peak_bytes": peak_bytes(self.task.device),
            "weight_bytes": weight_bytes(vae),
        }

    def _vae(self) -> Any:
        vae = WAN.needs_vae().build({"base_dim": 8} if self.task.shape == "tiny" else {})
        vae = vae.to_empty(device=self.task.device).float().eval()
        fill(vae, torch.device(self.task.device), torch.float32)
        return vae

    def _decoded(self, vae: Any, ranks: int, size: str, most: int | None = None) -> None:
        """Decode a clip, or its first latent frames, as rank 0 of so many does; pictures go to the host as they come.

        What neighbours would send is this rank's own.
        """
        width, height, frames = self.task.sizes[size]
        kind, config = WAN.needs_vae(), dict(vae.config)
        shape = kind.latent_shape(config)
        count = min(most or frames, 1 + (frames - 1) // shape.frames)
        latent = torch.randn(1, shape.channels, count, height // shape.downscale, width // shape.downscale)
        run: Any = None
        start = 0
        for length in kind.latent_pieces(count):
            piece = latent[:, :, start : start + length]
            if run is None:
                run = kind.start(vae, config, True, Axis(None, ranks, 0), piece.shape)
                run.bands._all_gather = lambda x: x.expand(ranks, *x.shape).contiguous()
            picture = run.piece(piece).cpu()
            start += length
        del picture

    @torch.inference_mode()
    def _memory(self, row: Row) -> dict[str, Any]:
        """Peaks of a prompt, a step of either expert and decoding, with all of them resident."""
        task, mesh, layout = self.task, self._mesh(row), layout_of(row.layout)
        self.forget()
        torch.compiler.reset()
        shape = task.model(DEPTH if task.shape != "tiny" else task.blocks)
        built = build_text_model(shape, mesh, task.dtype, "fp8")
        assert built is not None
        text, _, text_config = built
        experts = [build_transformer(shape, layout, mesh, task.dtype, None, Speed(), "fp8") for _ in range(2)]
        vae = self._vae()
        gc.collect()
        held = {
            "text encoder": weight_bytes(text),
            "experts": sum(map(weight_bytes, experts)),
            "VAE": weight_bytes(vae),
        }
        kind = WAN.needs_text_encoder()
        ids = torch.arange(shape.text_tokens, device=task.device)[None] % 1000
        x, inputs = self._inputs(shape, row.size)
        works: dict[str, Callable[[], Any]] = {
            "prompt": lambda: kind.encode(text, ids, torch.ones_like(ids), kind.layers(text_config)),
            "high noise": lambda: WAN.transformer.evaluate(experts[0], inputs, x),
            "low noise": lambda: WAN.transformer.evaluate(experts[1], inputs, x),
            "decoding": lambda: self._decoded(vae, layout.world_size, row.size),
        }
        peaks = {}
        for name, work in works.items():
            reset_peak(task.device)
            work()
            seconds_of(lambda: None, task.device)
            peaks[name] = peak_bytes(task.device)
        found: dict[str, Any] = {"held": held, "peaks": peaks, "peak_bytes": max(peaks.values())}
        if task.shape != "tiny":
            estimate = reference_memory(WAN, layout, fp8=True)
            found["estimated_bytes"] = estimate.total - estimate.runtime
        return found


def start(row: Row, device: str) -> None:
    """Begin the process group of a row, and those of as many ranks."""
    if row.ranks == 1:
        return
    if row.alone:
        start_alone(row.ranks)
    elif device == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=place)
    else:
        dist.init_process_group("gloo")


def of_ranks(job_file: Path) -> None:
    """Measure rows on this rank, one after the other; the process ends with the first that fails."""
    job = json.loads(job_file.read_text())
    task, rows = Task(**job["task"]), [Row(**row) for row in job["rows"]]
    start(rows[0], task.device)
    ranks, out = Ranks(task), job_file.with_name("rows.jsonl")
    rank = int(os.environ.get("RANK", 0))
    for row in rows:
        try:
            figures = ranks.measure(row)
        except Exception as error:  # whatever a row fails with, the others are measured
            figures = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:400], "rank": rank}
        if rank == 0 or "failed" in figures:
            with out.open("a") as file:
                file.write(json.dumps({**asdict(row), **figures}) + "\n")
        if "failed" in figures:
            os._exit(1)  # ranks that wait for this one are ended by torchrun
    os._exit(0)  # a group without its ranks has nothing to end
