"""How fast GPUs and their links are, as far as the choice of a layout needs it: measured, or else from datasheets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

from ..config import MESH_AXES, ParallelismConfig
from ..machine import Gpu, Machine
from .cost_model import Device, Link

_MEASURED = (769.0, 4800.0)
"""TFLOP/s in bf16 that the GEMMs of `cost_model.MEASURED` ran at on an H200, whose power limits them; its GB/s."""
_RATES = {
    # In bf16 without sparsity, and of its memory. The first that is in a GPU's name counts.
    "H200": _MEASURED,
    "H100 PCIe": (600.0, 2000.0),
    "H100": (769.0, 3350.0),
    "H20": (148.0, 4000.0),
    "B200": (1600.0, 8000.0),
    "A100": (312.0, 2000.0),
    "L40": (362.0, 864.0),
    "RTX PRO 6000": (500.0, 1792.0),
    "RTX 6000 Ada": (364.0, 960.0),
    "RTX 5090": (209.0, 1792.0),
    "RTX 4090": (165.0, 1008.0),
    "A6000": (155.0, 768.0),
    "3090": (71.0, 936.0),
}
_DEVICES = {
    # What makes one L20 take cache-dit's published 23.56 s for 28 steps of FLUX.1-dev. Its large cache helps.
    "L20": Device(compute=6.15, memory=2.0),
}

NVLINK_LANES = 18
NVLINK = Link(257.0, 0.055)
"""Eighteen NVLinks, between two H200: an all-reduce and two all-to-alls fit it within 3 %."""
PCIE = Link(16.0, 0.25)
"""PCIe 4.0 x16, fitted to cache-dit's published table of FLUX.2-dev on eight L20."""
HOST = Link(8.0, 0.25)
"""Without peer access; assumed to be half of that, since everything crosses the host's memory."""


def device_of(name: str) -> Device | None:
    """How a GPU of a name compares with the one that was measured; None where it is not known."""
    for key, device in _DEVICES.items():
        if re.search(rf"\b{key}\b", name):
            return device
    for key, (tflops, gb_per_s) in _RATES.items():
        if re.search(rf"\b{key}", name):
            return Device(_MEASURED[0] / tflops, _MEASURED[1] / gb_per_s)
    return None


def slowest(gpus: Sequence[Gpu]) -> tuple[Device, tuple[str, ...]]:
    """The device that all ranks wait for, and names of GPUs that are not known, which are taken as the measured one."""
    found = [(gpu.name, device_of(gpu.name)) for gpu in gpus]
    known = [device for _, device in found if device is not None] or [Device()]
    unknown = dict.fromkeys(name for name, device in found if device is None)
    return Device(max(d.compute for d in known), max(d.memory for d in known)), tuple(unknown)


def link_between(machine: Machine, first: int, second: int) -> Link:
    """The link between two GPUs; PCIe where nothing says that it is better."""
    for link in machine.links:
        if {link.first, link.second} == {first, second}:
            lanes = re.fullmatch(r"NV(\d+)", link.kind)
            if not link.peer_access:
                return HOST
            return Link(NVLINK.gb_per_s * int(lanes[1]) / NVLINK_LANES, NVLINK.latency_ms) if lanes else PCIE
    return PCIE


def axis_links(machine: Machine, gpus: Sequence[int], layout: ParallelismConfig) -> dict[str, Link]:
    """The slowest link within the groups of each axis that is split.

    Args:
        machine: where the GPUs are.
        gpus: their numbers in rank order.
        layout: degrees; the mesh is (ring, ulysses, tp), tp innermost.
    """
    degrees = dict(zip(MESH_AXES, (layout.ring_size, layout.ulysses_size, layout.tp_size), strict=True))
    strides = {"tp": 1, "ulysses": layout.tp_size, "ring": layout.tp_size * layout.ulysses_size}
    found = {}
    for axis, degree in degrees.items():
        if degree == 1:
            continue
        stride = strides[axis]
        starts = [rank for rank in range(layout.world_size) if rank // stride % degree == 0]
        groups = [[start + place * stride for place in range(degree)] for start in starts]
        pairs = [pair for group in groups for pair in combinations(group, 2)]
        if axis == "ring":  # only neighbours talk
            pairs = [(group[i - 1], group[i]) for group in groups for i in range(degree)]
        links = [link_between(machine, gpus[a], gpus[b]) for a, b in pairs]
        found[axis] = min(links, key=lambda link: link.gb_per_s)
    return found
