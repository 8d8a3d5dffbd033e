"""Seconds that a LoRA takes to go on, to change its strength and to go off, what it costs a step, and memory meanwhile.

A FLUX.2 transformer of random numbers with the true width, in one file (bf16 or fp8), runs in a worker group of each
layout, as the nodes run it. LoRAs of each rank change every matrix of its blocks; they are read from a file in the page
cache, as ComfyUI's loader reads one. Then one of `CYCLED` goes on and off ten times: "host" is the most that ComfyUI's
process or a rank took of host memory for itself above what it had before (beside page-locked buffers), "GPU" the most
that any rank's allocator held in each of the ten.
``python benchmarks/lora.py /tmp/weights --layouts TP-2,Ulysses-2 [--forms bf16,fp8] [--depth 1] [--json FILE]``;
``--heads 4 --depth 0.05 --size 128 --device cpu`` is small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
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
CYCLES, STEPS = 10, 8
TEXT = 15360
"""Channels of FLUX.2-dev's context."""


def write_lora(file: Path, model: Path, rank: int) -> None:
    """Two thin matrices, bf16, for every matrix of the blocks of a model's file."""
    tensors: dict[str, Tensor] = {}
    for key, entry in read_header(model).items():
        if "blocks" in key and len(entry.shape) == 2:
            rows, columns = entry.shape
            tensors[f"{key}.up"] = (torch.randn(rows, rank) * 0.01).bfloat16()
            tensors[f"{key}.down"] = (torch.randn(rank, columns) * 0.01).bfloat16()
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

    def set_of(self, lora: dict[str, tuple[Tensor, Tensor]], strength: float) -> AdapterSet:
        """Patches of a strength, as a set of their own."""
        self._sets += 1
        return AdapterSet(f"set {self._sets}", {key: [Patch("lora", pair, strength)] for key, pair in lora.items()})

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


def measure_rank(drawn: Drawn, file: Path, rank: int, plain: float) -> dict[str, Any]:
    """One LoRA on, changed and off."""
    began = time.perf_counter()
    lora = read_lora(file)
    read = time.perf_counter() - began
    strong = drawn.set_of(lora, 0.7)
    row: dict[str, Any] = {"rank": rank, "file_gib": file.stat().st_size / 2**30, "read_s": read}
    row["on_s"] = read + drawn.put_on(strong)
    row["step_s"] = drawn.step(strong)
    row["step_ratio"] = row["step_s"] / plain
    row["strength_s"] = drawn.put_on(drawn.set_of(lora, 0.3))
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


def measure(
    model: Path, layout: ParallelismConfig, form: str, ranks: Sequence[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """All figures of a layout and a form."""
    cpu = arguments.device == "cpu"
    devices = "cpu" if cpu else ",".join(map(str, range(layout.world_size)))
    speed = Speed(compile=arguments.compile)
    config = ModelConfig.create(model, layout, devices, fp8="stored" if form == "fp8" else "cast", speed=speed)
    try:
        drawn = Drawn(acquire_model(config), arguments.size, arguments.device)
        plain = drawn.step(NO_ADAPTERS)
        row: dict[str, Any] = {"layout": layout.name, "form": form, "compile": speed.compile, "step_s": plain}
        row["loras"] = [measure_rank(drawn, lora_file(model, rank), rank, plain) for rank in ranks]
        pids = list(drawn.model.group._pids.values())
        row["cycles"] = cycles(drawn, lora_file(model, CYCLED), ["self", *pids])
        return row
    finally:
        close_groups()


def lora_file(model: Path, rank: int) -> Path:
    """Of a model's LoRA of a rank."""
    return model.parent / f"lora_{rank}.safetensors"


def show(row: dict[str, Any]) -> None:
    """Print a layout's figures."""
    print(f"{row['layout']}, {row['form']}: {1000 * row['step_s']:.1f} ms a step without a LoRA")
    for one in row["loras"]:
        print(
            f"  rank {one['rank']} ({one['file_gib']:.2f} GiB): on {one['on_s']:.2f} s (of it reading "
            f"{one['read_s']:.2f}), strength {one['strength_s']:.3f}, off {one['off_s']:.2f}, on again "
            f"{one['on_again_s']:.2f}; {1000 * one['step_s']:.1f} ms a step (x {one['step_ratio']:.3f})"
        )
    for what, values in row["cycles"].items():
        print(f"  rank {CYCLED} on and off, {what}: {', '.join(f'{value:.0f}' for value in values)}", flush=True)


def main() -> None:
    """Print the figures, and write them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files are written; those that are there are taken")
    parser.add_argument("--layouts", default="TP-2,Ulysses-2", help="default: %(default)s")
    parser.add_argument("--forms", default="bf16,fp8", help="default: %(default)s")
    parser.add_argument("--ranks", default="16,64,256", help="default: %(default)s")
    parser.add_argument("--depth", type=float, default=1.0, help="share of FLUX.2-dev's blocks (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=48, help="heads of the transformer (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    rows: list[dict[str, Any]] = []
    for form in arguments.forms.split(","):
        folder = arguments.folder / f"lora_{form}_{arguments.depth:g}_{arguments.heads}"
        model = folder / "model.safetensors"
        if not model.exists():
            folder.mkdir(parents=True)
            make(FORMS[form], folder, config_of(arguments.depth, arguments.heads))
        for rank in {*ranks, CYCLED}:
            if not lora_file(model, rank).exists():
                write_lora(lora_file(model, rank), model, rank)
        for layout in map(layout_of, arguments.layouts.split(",")):
            rows.append(measure(model, layout, form, ranks, arguments))
            show(rows[-1])
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
