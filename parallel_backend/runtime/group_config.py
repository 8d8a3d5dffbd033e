"""What a worker group is keyed by, and everything about it that can be checked before a process is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..config import ParallelismConfig
from ..loading.checkpoint import open_checkpoint
from .devices import Devices, resolve_devices

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class GroupConfig:
    """What a group is keyed by: equal configurations share one group."""

    path: str
    layout: ParallelismConfig
    devices: Devices
    dtype: str
    fingerprint: str
    keep_fp8: bool = False

    @classmethod
    def create(
        cls,
        path: str | Path,
        layout: ParallelismConfig,
        devices: str = "auto",
        dtype: str = "auto",
        keep_fp8: bool = False,
    ) -> GroupConfig:
        """Check everything that can be checked without starting a process.

        Args:
            path: a diffusers pipeline folder, or a transformer in one safetensors file.
            layout: degrees.
            devices: see `resolve_devices`.
            dtype: of the weights, one of `DTYPES`; ``auto`` is bfloat16 on GPUs and float32 on the CPU.
            keep_fp8: weights that are stored in fp8 stay so, and ``dtype`` is that of the others and of the arithmetic.

        Raises:
            ValueError: a checkpoint, layout, device or dtype that cannot work, with the remedy.
        """
        if not hasattr(os, "memfd_create"):
            raise ValueError("worker groups need Linux (this system has no memfd_create); on Windows, run in WSL 2")
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
        source = open_checkpoint(Path(path))
        source.check(layout)
        resolved = resolve_devices(devices, layout.world_size)
        if dtype == "auto":
            dtype = "bfloat16" if resolved.kind == "cuda" else "float32"
        return cls(str(source.path), layout, resolved, dtype, source.fingerprint(), keep_fp8)
