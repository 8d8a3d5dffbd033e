"""How fast weights are loaded, against what disk and bus can do: FLUX.2-dev's transformer, or a share of its depth.

A checkpoint of random numbers is written to a folder (as a diffusers folder, a single file in bf16, and with ``--forms
fp8`` one in fp8; each is removed again), and loaded whole and as rank 0's shards. Cold loads are compared with a plain
read of the same files, loads out of the page cache with copies from page-locked memory. Cold, rows are read whole where
a rank wants some columns (its tp neighbours, which share the page cache, want the others), so "disk" can be more than
"read"; "share" is of the bytes that came from the disk there, "own" of those that were asked for.

Half the depth is 30 GiB in bf16: ``python benchmarks/load_speed.py /tmp/weights --depth 0.5``. ``--depth 0.25 --heads 8
--device cpu`` is 0.5 GiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import mmap
import os
import shutil
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_backend.families import family_of_transformer
from parallel_backend.loading import weight_loader
from parallel_backend.loading.file_reader import FileReader, Slice
from parallel_backend.loading.safetensors_reader import DTYPES, index_folder, whole
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.staging import BUFFER_BYTES, BUFFERS
from parallel_backend.mesh import Axis
from parallel_backend.parallel.tensor import apply_tensor_parallel

GIB = 2**30
FAMILY = family_of_transformer("Flux2Transformer2DModel")
FORMS = ("folder", "single", "fp8")
FILE_BYTES = 10 * 10**9
"""Of one file of a folder, as diffusers writes them by default."""
PLAIN_BYTES = 8 * GIB
"""As much is read and copied at most to know the speed of the disk and the bus."""


class CountingReader(FileReader):
    """Adds up the bytes that are asked of the files."""

    count = 0
    _counting = threading.Lock()

    def read(self, part: Slice, into: Any) -> None:
        super().read(part, into)
        with self._counting:
            CountingReader.count += part.nbytes


class HostMemory:
    """The most anonymous memory of a process in a span of time, above what it was at its start."""

    def __init__(self, pid: int | str = "self") -> None:
        self.status = Path(f"/proc/{pid}/status")

    def __enter__(self) -> HostMemory:
        self.peak, self._base, self._done = 0, self._now(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._now() - self._base)

    def _now(self) -> int:
        lines = self.status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def config_of(depth: float, heads: int) -> dict[str, Any]:
    """FLUX.2-dev's configuration at a share of its depth and with so many heads (48)."""
    return {
        "num_layers": max(1, round(8 * depth)),
        "num_single_layers": max(1, round(48 * depth)),
        "num_attention_heads": heads,
    }


def stored_as(form: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a form, from the model's parameters."""
    if form == "folder":
        return {name: ("BF16", shape) for name, shape in shapes.items()}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        pieces = FAMILY.transformer.file_rows(name)
        key, _, parts = pieces[0]
        in_fp8 = form == "fp8" and "_blocks." in key and len(shape) == 2
        tensors[key] = "F8_E4M3" if in_fp8 else "BF16", (shape[0] // len(pieces) * parts, *shape[1:])
        if in_fp8:
            tensors[f"{key.removesuffix('.weight')}.weight_scale"] = "F32", ()
    return tensors


def write(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], blocks: Mapping[str, memoryview]) -> None:
    """Write a safetensors file; each tensor is the same random numbers over and over."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    layers = {
        name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in header if tensors[name][0] == "F8_E4M3"
    }
    if layers:
        header["__metadata__"] = {"_quantization_metadata": json.dumps({"layers": layers})}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for dtype, shape in tensors.values():
            left, block = math.prod(shape) * DTYPES[dtype].itemsize, blocks[dtype]
            while left:
                left -= stream.write(block[: min(left, len(block))])
        os.fsync(stream.fileno())  # pages that are not on the disk yet cannot be dropped


def make(form: str, folder: Path, config: dict[str, Any]) -> list[Path]:
    """Write a checkpoint in one of the forms; its files."""
    model = FAMILY.transformer.build(config)
    tensors = stored_as(form, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    numbers = torch.randn(16 * 2**20) * 0.02
    blocks = {
        "BF16": numbers.bfloat16().view(torch.uint8),
        "F8_E4M3": (numbers * 1000).to(torch.float8_e4m3fn).view(torch.uint8),
        "F32": torch.tensor([0.001]).view(torch.uint8),
    }
    views = {dtype: block.numpy().data for dtype, block in blocks.items()}
    if form != "folder":
        write(folder / "model.safetensors", tensors, views)
        return [folder / "model.safetensors"]
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        size += math.prod(shape) * DTYPES[dtype].itemsize
        if size > FILE_BYTES and groups[-1]:
            groups.append({})
            size = math.prod(shape) * DTYPES[dtype].itemsize
        groups[-1][name] = dtype, shape
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-{index + 1:05}-of-{len(groups):05}.safetensors" for index in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write(folder / name, group, views)
    index = {"weight_map": {key: name for name, group in zip(names, groups, strict=True) for key in group}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return [folder / name for name in names]


def drop(files: list[Path]) -> None:
    """Have nothing of the files in the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(files: list[Path], limit: int) -> tuple[int, float]:
    """Read so many bytes of the files, from their beginnings on; bytes and seconds."""
    buffer = memoryview(mmap.mmap(-1, 16 * 2**20))
    buffer[::4096] = bytes(len(buffer[::4096]))
    done, begin = 0, time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        while done < limit and (count := os.preadv(descriptor, [buffer[: limit - done]], os.lseek(descriptor, 0, 1))):
            os.lseek(descriptor, count, 1)
            done += count
        os.close(descriptor)
    return done, time.perf_counter() - begin


def copy_plainly(device: torch.device, size: int) -> float:
    """GB/s of copies from page-locked memory to the device (on the CPU, from memory to memory)."""
    chunk = min(size, 256 * 2**20)
    source = torch.ones(chunk, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(chunk, dtype=torch.uint8, device=device)
    for count in (1, max(1, size // chunk)):
        wait(device)
        begin = time.perf_counter()
        for _ in range(count):
            target.copy_(source, non_blocking=True)
        wait(device)
        seconds = time.perf_counter() - begin
    return count * chunk / seconds / 1e9


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def disk_bytes(pid: int | str = "self") -> int:
    """Read by a process from disks so far."""
    return int(dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())["read_bytes"])


def load(
    form: str, files: list[Path], config: dict[str, Any], degree: int, device: torch.device, fp8: str
) -> dict[str, float]:
    """Load rank 0's shard; figures in seconds and bytes."""
    if form == "folder":
        weights = {name: whole(tensor) for name, tensor in index_folder(files[0].parent).items()}
    else:
        weights = dict(open_single_file(files[0]).transformer_weights)
    model = FAMILY.transformer.build(config)
    plan = FAMILY.transformer.plan(dict(model.config))
    table = apply_tensor_parallel(model, plan, Axis(None, degree, 0))
    CountingReader.count, before = 0, disk_bytes()
    base = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    with HostMemory() as memory:
        wait(device)
        begin = time.perf_counter()
        held = weight_loader.load_weights(model, weights, table, device=device, dtype=torch.bfloat16, fp8=fp8)
        wait(device)
        seconds = time.perf_counter() - begin
    # On a GPU the ring is page-locked memory, which is not counted as this process's.
    ring, above = (BUFFERS * BUFFER_BYTES, 0) if device.type == "cuda" else (0, held)
    return {
        "seconds": seconds,
        "held": held,
        "read": CountingReader.count,
        "disk": disk_bytes() - before,
        "host_peak": max(0, memory.peak + ring - above),
        "gpu_peak": torch.cuda.max_memory_allocated() - base - held if device.type == "cuda" else 0,
    }


def measure(
    form: str, files: list[Path], config: dict[str, Any], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each shard and state of the page cache."""
    device = torch.device(arguments.device)
    for state in arguments.states:
        for degree in arguments.degrees:
            if state == "cold":
                drop(files)
            else:
                read_plainly(files, sum(file.stat().st_size for file in files))
            figures = load(form, files, config, degree, device, arguments.fp8)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            size = int(min(figures["read"], PLAIN_BYTES))
            bus = copy_plainly(device, size)
            plain = bus
            if state == "cold":
                drop(files)
                count, seconds = read_plainly(files, size)
                plain = count / seconds / 1e9
            speed = figures["read"] / figures["seconds"] / 1e9
            limit = min(plain, bus)
            moved = max(figures["read"], figures["disk"]) / figures["seconds"] / 1e9
            yield {
                "form": form, "tp": degree, "state": state, **figures,
                "gb_s": speed, "disk_gb_s": plain if state == "cold" else None, "bus_gb_s": bus,
                "own": speed / limit, "share": moved / limit,
            }  # fmt: skip


def main() -> None:
    """Print one row as it is measured, and write all of them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where checkpoints are written, and removed again")
    parser.add_argument("--depth", type=float, default=0.5, help="share of FLUX.2-dev's blocks")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS[:2])
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--states", nargs="+", choices=["cold", "cached"], default=["cold", "cached"])
    parser.add_argument("--fp8", choices=weight_loader.FP8_MODES, default="matmul")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    weight_loader.FileReader = CountingReader  # type: ignore[misc]
    config = config_of(arguments.depth, arguments.heads)
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, {os.cpu_count()} cores, depth {arguments.depth}: {config}")
    print(
        "form     tp  state   seconds  GiB held  GiB read  GiB disk    GB/s   disk GB/s  bus GB/s    own  share"
        "  host MiB  GPU MiB above"
    )
    rows = []
    for form in arguments.forms:
        folder = arguments.folder / f"load-speed-{form}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            begin = time.perf_counter()
            files = make(form, folder, config)
            size = sum(file.stat().st_size for file in files)
            seconds = time.perf_counter() - begin
            print(f"{form}: {size / GIB:.1f} GiB in {len(files)} files, written in {seconds:.0f} s", flush=True)
            for row in measure(form, files, config, arguments):
                rows.append(row)
                gib = [row[key] / GIB for key in ("held", "read", "disk")]
                disk = f"{row['disk_gb_s']:.2f}" if row["disk_gb_s"] else "-"
                print(
                    f"{form:8} {row['tp']:2}  {row['state']:6} {row['seconds']:8.2f} {gib[0]:9.2f} {gib[1]:9.2f}"
                    f" {gib[2]:9.2f} {row['gb_s']:7.2f} {disk:>11} {row['bus_gb_s']:9.2f}"
                    f" {row['own']:6.0%} {row['share']:6.0%}"
                    f" {row['host_peak'] / 2**20:9.0f} {row['gpu_peak'] / 2**20:14.0f}",
                    flush=True,
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
