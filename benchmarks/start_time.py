"""Seconds from asking for a worker group to all of its ranks ready: with cold imports, and the next groups.

``python benchmarks/start_time.py --devices cpu --ranks 4``; the first line is of a group whose fork server was
started for it, the others are of groups after it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from parallel_backend.config import ParallelismConfig
from parallel_backend.drawing.demo_model import demo_folder
from parallel_backend.loading.checkpoint import imports_of, open_checkpoint
from parallel_backend.runtime.client.worker_group import WorkerGroup
from parallel_backend.runtime.group_config import GroupConfig, check_devices
from parallel_backend.runtime.host_address import ALONE


def memory(pid: int) -> dict[str, int]:
    """MiB of a process's memory: its share of what it shares with others (PSS), and what is its alone (USS)."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        values[name.rstrip(":")] = int(size) // 1024
    return {"pss": values["Pss"], "uss": values["Private_Clean"] + values["Private_Dirty"]}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="cpu", help="auto, cpu or GPUs such as 0,1")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--groups", type=int, default=4, help="how many are started, one after the other")
    parser.add_argument("--model", type=Path, default=demo_folder(), help="whose modules are imported")
    parser.add_argument("--transformer-only", action="store_true", help="as if it had no text encoder and no VAE")
    arguments = parser.parse_args()
    source = open_checkpoint(arguments.model)
    imports = list(source.family.imports("transformer")) if arguments.transformer_only else imports_of(source)
    devices = check_devices(arguments.devices, ParallelismConfig(ulysses_size=arguments.ranks), ALONE)
    for number in range(arguments.groups):
        group = WorkerGroup(GroupConfig(devices, arguments.ranks))
        began = time.perf_counter()
        group.start(imports=imports)
        seconds = time.perf_counter() - began
        ranks = {rank: memory(pid) for rank, pid in sorted(group._pids.items())}
        began = time.perf_counter()
        group.close()
        row = {"group": number, "start_s": round(seconds, 2), "end_s": round(time.perf_counter() - began, 2)}
        print(json.dumps({**row, "MiB": ranks, "load": os.getloadavg()[0]}), flush=True)


if __name__ == "__main__":
    main()
