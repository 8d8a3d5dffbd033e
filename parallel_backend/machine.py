"""Facts about a machine: software, GPUs and their links, memory. Nothing is judged here."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from typing import Any

from . import limits
from .requirements import REQUIRED, installed

ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "NCCL_P2P_DISABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; memory in bytes."""

    index: int
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Link:
    """How two GPUs are connected: whether they reach each other's memory, and nvidia-smi's word (``NV18``, ``PHB``)."""

    first: int
    second: int
    peer_access: bool
    kind: str = ""


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; memory in bytes, None where it cannot be told."""

    system: str
    python: str
    versions: dict[str, str | None]
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    links: tuple[Link, ...] = ()
    driver_gpus: int = 0  # GPUs that nvidia-smi sees, whatever torch sees
    nccl: str | None = None
    gloo: bool = True
    cores: int = 1
    memory_total: int | None = None
    memory_available: int | None = None
    memfd: bool = True
    missing_build_tools: str = ""  # of a compiler and what it needs; empty if all is there
    shm_total: int | None = None
    shm_free: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def collect() -> Machine:
    """Look at this machine. Nothing that is missing on it is an error here."""
    memory = limits.memory()
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    topology = parse_topology(_nvidia_smi("topo", "-m"))
    return Machine(
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: installed(name) for name in REQUIRED},
        driver_gpus=len(topology),
        cores=limits.cores(),
        memory_total=memory.total,
        memory_available=memory.available,
        memfd=hasattr(os, "memfd_create"),
        missing_build_tools=missing_build_tools(),
        shm_total=shm and shm.total,
        shm_free=shm and shm.free,
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **_torch_facts(topology),
    )


def parse_topology(text: str) -> dict[int, dict[int, str]]:
    """The matrix of ``nvidia-smi topo -m``: GPU -> GPU -> how they are connected. Empty if it cannot be read."""
    # The header is underlined by escape codes on some drivers.
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    header = next((line for line in lines if line and line[0] == "GPU0"), [])
    columns = [int(word[3:]) for word in header if re.fullmatch(r"GPU\d+", word)]
    rows = (line for line in lines if line and line is not header and re.fullmatch(r"GPU\d+", line[0]))
    return {int(line[0][3:]): dict(zip(columns, line[1:], strict=False)) for line in rows}


def _torch_facts(topology: dict[int, dict[int, str]]) -> dict[str, Any]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError):
        return {}
    gpus, count = [], torch.cuda.device_count()
    for index in range(count):
        name, total, free = "", 0, 0
        with contextlib.suppress(RuntimeError):  # no memory is left for so much as a context, or the GPU is gone
            properties = torch.cuda.get_device_properties(index)
            name, total = properties.name, properties.total_memory
            free = torch.cuda.mem_get_info(index)[0]
        gpus.append(Gpu(index, name, total, free))
    # nvidia-smi counts all GPUs, torch those that are visible: match them only where they are the same.
    kinds = topology if len(topology) == count and "CUDA_VISIBLE_DEVICES" not in os.environ else {}
    links = tuple(
        Link(a, b, _reaches(a, b), kinds.get(a, {}).get(b, "")) for a in range(count) for b in range(a + 1, count)
    )
    has_nccl = dist.is_available() and dist.is_nccl_available()
    return {
        "cuda": torch.version.cuda,
        "gpus": tuple(gpus),
        "links": links,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        "gloo": dist.is_available() and dist.is_gloo_available(),
    }


def _reaches(first: int, second: int) -> bool:
    import torch

    try:
        return torch.cuda.can_device_access_peer(first, second)
    except RuntimeError:  # one of them is gone
        return False


def _nvidia_smi(*arguments: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def missing_system() -> str:
    """Why workers cannot run on this system at all, with the remedy; empty where they can."""
    if hasattr(os, "memfd_create"):
        return ""
    if sys.platform == "win32":
        return "parallel workers need Linux, and this is Windows; run ComfyUI in WSL 2, where they work"
    if sys.platform == "darwin":
        return "parallel workers need Linux, and this is macOS; run ComfyUI on a Linux machine"
    return "parallel workers need memfd_create, which this Linux lacks; take a kernel 3.17 or later, and glibc 2.27"


def missing_build_tools() -> str:
    """What is missing here to build kernels at run time, as Triton and torch.compile do; empty if nothing is."""
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler (such as the package gcc)")
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing.append("Python.h (such as the package python3-dev)")
    return " and ".join(missing)
