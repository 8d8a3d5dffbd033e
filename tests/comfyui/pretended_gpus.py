"""Test hooks (see launch_server.HOOKS_VARIABLE): ComfyUI's process believes in GPUs, and ranks on them run on the CPU.

How many there are is read anew each time from the file that `FILE` names, so that one server can have one, two, three.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

FILE = "HYBRID_DIT_PRETENDED_GPUS"
"""Environment variable: a file with the number of GPUs, and the kind of their links (as nvidia-smi has it)."""
NVLINK = "NV18"
GIB = 2**30


def count() -> int:
    return int(_words()[0])


def _words() -> list[str]:
    """The number of GPUs, and the kind of their links where it is not `NVLINK`."""
    return [*Path(os.environ[FILE]).read_text().split(), NVLINK][:2]


def _see_gpus(devices: ModuleType) -> None:
    devices.torch = SimpleNamespace(cuda=SimpleNamespace(device_count=count))


def _collect_gpus(machine: ModuleType) -> None:
    collect = machine.collect

    def collect_with_gpus():
        gpus = tuple(machine.Gpu(index, "NVIDIA H200", 140 * GIB, 139 * GIB) for index in range(count()))
        links = tuple(
            machine.Link(a.index, b.index, True, _words()[1]) for a in gpus for b in gpus if a.index < b.index
        )
        return dataclasses.replace(collect(), gpus=gpus, links=links)

    machine.collect = collect_with_gpus


def _link_at_once(gpu_speed: ModuleType) -> None:
    gpu_speed.NVLINK = gpu_speed.Link(1e9, 0.0)  # else models as small as the tests' would take one GPU


def _run_on_cpu(group_config: ModuleType) -> None:
    resolve = group_config.resolve_devices

    def resolve_to_cpu(spec, ranks):
        resolve(spec, ranks)  # for what it refuses
        return group_config.Devices("cpu")

    group_config.resolve_devices = resolve_to_cpu


_CHANGES: dict[str, Callable[[ModuleType], None]] = {
    ".parallel_backend.planning.devices": _see_gpus,
    ".parallel_backend.machine": _collect_gpus,
    ".parallel_backend.planning.gpu_speed": _link_at_once,
    ".parallel_backend.runtime.group_config": _run_on_cpu,
}
"""End of a module's name -> what is done to it once it is there. In ranks the names have nothing before them."""


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        change = next((change for end, change in _CHANGES.items() if fullname.endswith(end)), None)
        spec = None if change is None else importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                change(module)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    sys.meta_path.insert(0, _Finder())
