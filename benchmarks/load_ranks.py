"""How long real ranks take to load FLUX.2-dev's transformer from one disk, and what they read and hold meanwhile.

A checkpoint of random numbers, at a share of the true depth, is written to a folder and removed again (or kept). A
worker group of each layout loads it, as the nodes do, with nothing of it in the page cache and with all of it. "Disk"
is what all ranks together read from the disk; "host" and "GPU" are the most that one rank took of host memory for
itself (beside the page cache and page-locked buffers), and of its GPU beyond the weights. `load_speed.py` compares a
single rank with what disk and bus can do.
``python benchmarks/load_ranks.py /tmp/weights --layouts TP-2,Ulysses-2 [--depth 1] [--keep] [--json FILE]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_cache_dit import layout_of
from benchmarks.load_speed import FAMILY, GIB, HostMemory, config_of, disk_bytes, drop, make, read_plainly
from benchmarks.round_trip import make_pipeline
from parallel_backend.config import ParallelismConfig
from parallel_backend.runtime.client.worker_group import WorkerGroup
from parallel_backend.runtime.group_config import ModelConfig

COMPLETE = "complete"
"""A file that says that all others of a folder were written, and at which depth."""


def write_pipeline(folder: Path, depth: float) -> None:
    """Make a pipeline folder whose transformer has FLUX.2-dev's width and a share of its depth."""
    transformer = make_pipeline(folder) / "transformer"
    shutil.rmtree(transformer)
    transformer.mkdir()
    config = config_of(depth, 48)
    make("folder", transformer, config)
    FAMILY.transformer.build(config).save_config(transformer)
    (folder / COMPLETE).write_text(str(depth))


def measure(folder: Path, layout: ParallelismConfig, device: str) -> dict[str, Any]:
    """A fresh group loads a pipeline folder: seconds and bytes."""
    devices = ",".join(map(str, range(layout.world_size))) if device == "cuda" else device
    config = ModelConfig.create(folder, layout, devices)
    group = WorkerGroup(config.group)
    try:
        group.start()
        pids = list(group._pids.values())
        before = sum(map(disk_bytes, pids))
        with contextlib.ExitStack() as stack:
            memory = [stack.enter_context(HostMemory(pid)) for pid in pids]
            model = group.load(config)
        disk = sum(map(disk_bytes, pids)) - before
        report = model.report()
    finally:
        group.close()
    held = [sum(rank["weight_bytes"].values()) for rank in report["ranks"]]
    return {
        "seconds": report["seconds"]["load"],
        "held": max(held),
        "disk": disk,
        "host_peak": max(one.peak for one in memory),
        "device_peak": max(rank["peak_bytes"] - own for rank, own in zip(report["ranks"], held, strict=True)),
    }


def main() -> None:
    """Print a row for each layout and state of the page cache, and write all of them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written, and removed again")
    parser.add_argument("--keep", action="store_true", help="do not remove it; use one of this depth that is there")
    parser.add_argument("--layouts", default="TP-2,Ulysses-2", help="default: %(default)s; empty: only write")
    parser.add_argument("--states", nargs="+", choices=["cold", "cached"], default=["cold", "cached"])
    parser.add_argument("--depth", type=float, default=1.0, help="share of FLUX.2-dev's blocks (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder, rows = arguments.folder / "flux2", []
    try:
        complete = folder / COMPLETE
        if not complete.exists() or complete.read_text() != str(arguments.depth):
            complete.unlink(missing_ok=True)
            write_pipeline(folder, arguments.depth)
        files = sorted((folder / "transformer").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{size / GIB:.1f} GiB\n| layout | page cache | s | GiB a rank | GB/s | disk GiB | host MiB | GPU MiB |")
        for layout in map(layout_of, filter(None, arguments.layouts.split(","))):
            for state in arguments.states:
                drop(files) if state == "cold" else read_plainly(files, size)
                row = {
                    "layout": layout.name,
                    "state": state,
                    "bytes": size,
                    **measure(folder, layout, arguments.device),
                }
                rows.append(row)
                print(
                    f"| {layout.name} | {state} | {row['seconds']:.1f} | {row['held'] / GIB:.2f} | "
                    f"{size / row['seconds'] / 1e9:.2f} | {row['disk'] / GIB:.2f} | {row['host_peak'] / 2**20:.0f} | "
                    f"{row['device_peak'] / 2**20:.0f} |",
                    flush=True,
                )
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
