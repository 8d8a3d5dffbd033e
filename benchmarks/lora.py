"""Seconds that a LoRA takes to go on, to change its strength and to go off, what it costs a step, and memory meanwhile.

A FLUX.2 transformer of random numbers with the true width and a share of the depth, in one file (bf16 or fp8), runs in
a worker group of each layout, as the nodes run it. LoRAs of each rank change every matrix of its blocks; they are read
from a file in the page cache, as ComfyUI's loader reads one. Beside weights in fp8 they stand as thin matrices; in bf16
they are merged, and one of rank `BESIDE` stands beside as well, as a hook's does. Then one of rank `CYCLED` goes on and
off ten times: "host" is the most that ComfyUI's process or a rank took of host memory for itself above what it had
before (beside page-locked buffers), "GPU" the most that any rank's allocator held in each of the ten.

Each row is printed when it is there; one that fails is said, and the next has a new group. With ``--json`` rows are
kept, and those that are there are not measured again.

``python benchmarks/lora.py /tmp/weights [--devices 0,1] [--forms bf16,fp8] [--depth 0.25] [--json FILE]``: TP and
Ulysses over those GPUs; ``--heads 4 --depth 0.05 --size 128 --device cpu`` is small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_cache_dit import layout_of
from benchmarks.load_speed import HostMemory, config_of, make
from parallel_backend.config import ParallelismConfig, Speed
from parallel_backend.families import Conditioning
from parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet, Patch
from parallel_backend.loading.safetensors_reader import read_header
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.group_config import ModelConfig

FORMS = {"bf16": "single", "fp8": "fp8"}
CYCLED = 128
"""Rank of the LoRA that goes on and off."""
BESIDE = 64
"""Rank of the LoRA that stands beside plain weights, too."""
CYCLES, STEPS = 10, 8
TEXT = 15360
"""Channels of FLUX.2-dev's context."""


def write_lora(file: Path, model: Path, rank: int) -> None:
    """Two thin matrices, bf16, for every matrix of the blocks of a model's file."""
    tensors: dict[str, Tensor] = {}
    numbers = (torch.randn(2**22) * 0.01).bfloat16()  # over and over: random ones take longer than all the rest
    for key, entry in read_header(model).items():
        if "blocks" in key and len(entry.shape) == 2:
            rows, columns = entry.shape
            for name, shape in (("up", (rows, rank)), ("down", (rank, columns))):
                count = math.prod(shape)
                tensors[f"{key}.{name}"] = numbers.repeat(-(-count // len(numbers)))[:count].view(shape)
    save_file(tensors, file)


def read_lora(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Names of weights -> the two matrices."""
    tensors = load_file(file)
    keys = [key.removesuffix(".up") for key in tensors if key.endswith(".up")]
    return {key: (tensors[f"{key}.up"], tensors[f"{key}.down"]) for key in keys}


class Drawn:
    """A model in the workers, and the latent and context of one size that its steps are timed with."""

    def __init__(self, model: RemoteModel, size: int, device: str) -> None:
        dtype = getattr(torch, model.config.dtype)
        self.model, self._sets = model, 0
        self.x = torch.randn(1, 128, size // 16, size // 16, device=device, dtype=dtype)
        context = torch.randn(1, 512, TEXT, device=device, dtype=dtype)
        self.timestep = torch.full((1,), 0.5, device=device)
        self.conditioning = Conditioning(context, tensors={"guidance": torch.full((1,), 4.0, device=device)})

    def set_of(self, lora: dict[str, tuple[Tensor, Tensor]], strength: float, beside: bool = False) -> AdapterSet:
        """Patches of a strength, as a set of their own; ``beside``: not merged into plain weights."""
        self._sets += 1
        patches = {key: [Patch("lora", pair, strength, switched=beside)] for key, pair in lora.items()}
        return AdapterSet(f"set {self._sets}", patches)

    def put_on(self, adapters: AdapterSet) -> float:
        """Seconds until a set is on, and nothing else is."""
        began = time.perf_counter()
        self.model._adapt("transformer", adapters, lambda: None)
        return time.perf_counter() - began

    def step(self, adapters: AdapterSet) -> float:
        """Median of the ranks' own seconds a step, after two that warm up."""
        for number in range(STEPS + 2):
            if number == 2:
                self.model.reset_timings()
            self.model.predict(self.x, self.timestep, self.conditioning, adapters=adapters)
        return statistics.median(self.model.seconds["workers"])


def measure_rank(drawn: Drawn, file: Path, rank: int, plain: float, beside: bool) -> dict[str, Any]:
    """One LoRA on, changed and off."""
    began = time.perf_counter()
    lora = read_lora(file)
    read = time.perf_counter() - began
    strong = drawn.set_of(lora, 0.7, beside)
    row: dict[str, Any] = {"rank": rank, "file_gib": file.stat().st_size / 2**30, "read_s": read}
    row["on_s"] = read + drawn.put_on(strong)
    row["step_s"] = drawn.step(strong)
    row["plain_step_s"] = plain
    row["step_percent"] = 100 * (row["step_s"] / plain - 1)
    row["strength_s"] = drawn.put_on(drawn.set_of(lora, 0.3, beside))
    row["off_s"] = drawn.put_on(NO_ADAPTERS)
    row["on_again_s"] = drawn.put_on(strong)
    drawn.put_on(NO_ADAPTERS)
    return row


def cycles(drawn: Drawn, file: Path, pids: Sequence[int | str]) -> dict[str, Any]:
    """Peaks of each of the cycles, in MiB."""
    host, device = [], []
    for _ in range(CYCLES):
        with contextlib.ExitStack() as stack:
            memory = [stack.enter_context(HostMemory(pid)) for pid in pids]
            drawn.put_on(drawn.set_of(read_lora(file), 0.7))
            drawn.put_on(NO_ADAPTERS)
        host.append(max(one.peak for one in memory) / 2**20)
        device.append(max(rank["peak_bytes"] for rank in drawn.model.report()["ranks"]) / 2**20)
    return {"host_mib": host, "gpu_mib": device}


class Group:
    """A worker group that is started when a row needs one; after a row that failed, another is."""

    def __init__(self, model: Path, layout: ParallelismConfig, form: str, arguments: argparse.Namespace) -> None:
        devices = "cpu" if arguments.device == "cpu" else ",".join(arguments.devices.split(",")[: layout.world_size])
        speed, fp8 = Speed(compile=arguments.compile), "stored" if form == "fp8" else "cast"
        self._config = ModelConfig.create(model, layout, devices, fp8=fp8, speed=speed)
        self._model, self._size, self._device = model, arguments.size, arguments.device
        self._drawn: Drawn | None = None
        self._plain = 0.0

    def measure(self, what: str) -> dict[str, Any]:
        """The figures of a row: "rank N", "rank N beside" or "cycles"."""
        try:
            if self._drawn is None:
                self._drawn = Drawn(acquire_model(self._config), self._size, self._device)
                self._plain = self._drawn.step(NO_ADAPTERS)
            if what == "cycles":
                pids = list(self._drawn.model.group._pids.values())
                return cycles(self._drawn, lora_file(self._model, CYCLED), ["self", *pids])
            rank = int(what.split()[1])
            return measure_rank(self._drawn, lora_file(self._model, rank), rank, self._plain, what.endswith("beside"))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks."""
        self._drawn = None
        close_groups()


def lora_file(model: Path, rank: int) -> Path:
    """Of a model's LoRA of a rank."""
    return model.parent / f"lora_{rank}.safetensors"


def line(row: dict[str, Any]) -> str:
    """A row's figures."""
    name = f"{row['layout']}, {row['form']}, {row['what']}"
    if "error" in row:
        return f"{name}: failed: {row['error']}"
    if row["what"] == "cycles":
        return "\n".join(
            f"{name}, rank {CYCLED} on and off, {what}: {', '.join(f'{value:.0f}' for value in row[what])}"
            for what in ("host_mib", "gpu_mib")
        )
    return (
        f"{name} ({row['file_gib']:.2f} GiB): on {row['on_s']:.2f} s (of it reading {row['read_s']:.2f}), strength "
        f"{row['strength_s']:.3f}, off {row['off_s']:.2f}, on again {row['on_again_s']:.2f}; a step "
        f"{1000 * row['plain_step_s']:.1f} ms without, {1000 * row['step_s']:.1f} with ({row['step_percent']:+.1f} %)"
    )


def measure_all(
    names: Sequence[str], measure: Callable[[str], dict[str, Any]], labels: dict[str, Any], kept: Path | None
) -> list[dict[str, Any]]:
    """Measure and print those of some rows that a file does not have; those that fail are tried again next time.

    Args:
        names: what the rows measure.
        measure: gives a row's figures.
        labels: tells these rows from others in the file.
        kept: the file; None keeps nothing.
    """
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else []
    for what in names:
        label = {**labels, "what": what}
        before = [row for row in rows if label.items() <= row.items()]
        if before and "error" not in before[0]:
            print(line(before[0]), flush=True)
            continue
        try:
            row = {**label, **measure(what)}
        except Exception as error:
            row = {**label, "error": f"{type(error).__name__}: {error}"}
        rows = [*(one for one in rows if one not in before), row]
        print(line(row), flush=True)
        if kept:
            kept.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def names_of(form: str, ranks: Sequence[int]) -> list[str]:
    """Rows of a form; plain weights have one more, of a LoRA that is not merged."""
    beside = [f"rank {BESIDE} beside"] if form == "bf16" else []
    return [*(f"rank {rank}" for rank in ranks), *beside, "cycles"]


def main() -> None:
    """Print the figures, and keep them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files are written; those that are there are taken")
    parser.add_argument("--devices", default="0", help="GPUs, as in 0,1 (default: %(default)s)")
    parser.add_argument("--layouts", help="default: single for one GPU, TP-N,Ulysses-N for N")
    parser.add_argument("--forms", default="bf16,fp8", help="default: %(default)s")
    parser.add_argument("--ranks", default="16,64,256", help="default: %(default)s")
    parser.add_argument("--depth", type=float, default=0.25, help="share of FLUX.2-dev's blocks (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=48, help="heads of the transformer (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where rows are kept, and not measured again")
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    count = len(arguments.devices.split(","))
    layouts = arguments.layouts or ("single" if count == 1 else f"TP-{count},Ulysses-{count}")
    config = config_of(arguments.depth, arguments.heads)
    print(
        f"{config['num_layers']} + {config['num_single_layers']} of FLUX.2-dev's 8 + 48 blocks, {arguments.heads} of "
        f"its 48 heads, {arguments.size} pixels; file and seconds grow with the blocks",
        flush=True,
    )
    for form in arguments.forms.split(","):
        folder = arguments.folder / f"lora_{form}_{arguments.depth:g}_{arguments.heads}"
        model = folder / "model.safetensors"
        if not model.exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(FORMS[form], folder, config)
        for rank in {*ranks, BESIDE, CYCLED}:
            if not lora_file(model, rank).exists():
                write_lora(lora_file(model, rank), model, rank)
        for layout in map(layout_of, layouts.split(",")):
            group = Group(model, layout, form, arguments)
            labels = {"layout": layout.name, "form": form, "depth": arguments.depth, "heads": arguments.heads}
            labels |= {"size": arguments.size, "compile": arguments.compile}
            try:
                measure_all(names_of(form, ranks), group.measure, labels, arguments.json)
            finally:
                group.close()


if __name__ == "__main__":
    main()
