"""The rows of the reference table, by the name they have there, and which of them stand for all."""

from collections.abc import Iterable

import pytest

from parallel_backend import ParallelismConfig

REFERENCE_TABLE = {
    "TP-2": ParallelismConfig(tp_size=2),
    "TP-4": ParallelismConfig(tp_size=4),
    "TP-8": ParallelismConfig(tp_size=8),
    "Ring-2": ParallelismConfig(ring_size=2),
    "Ring-4": ParallelismConfig(ring_size=4),
    "Ring-8": ParallelismConfig(ring_size=8),
    "Ulysses-2": ParallelismConfig(ulysses_size=2),
    "Ulysses-4": ParallelismConfig(ulysses_size=4),
    "Ulysses-8": ParallelismConfig(ulysses_size=8),
    "Ulysses-4-TP-2": ParallelismConfig(ulysses_size=4, tp_size=2),
    "Ulysses-2-TP-4": ParallelismConfig(ulysses_size=2, tp_size=4),
    "Ring-4-TP-2": ParallelismConfig(ring_size=4, tp_size=2),
    "Ring-2-TP-4": ParallelismConfig(ring_size=2, tp_size=4),
    "USP-2-2-TP-2": ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2),
}

TYPICAL = ("TP-4", "Ring-4", "Ulysses-4", "USP-2-2-TP-2")
"""Each axis alone, and all with each other: enough beside FLUX.2's forward, which is compared on every layout."""


def all_layouts(*values: object, names: Iterable[str] = tuple(REFERENCE_TABLE)) -> list:
    """Values for a test's arguments, the last of which is a layout's name; ``make test`` has the typical ones."""
    return [pytest.param(*values, name, marks=[] if name in TYPICAL else [pytest.mark.thorough]) for name in names]


TEXT_ENCODER_LAYOUTS = [
    *("TP-2", "USP-2-2-TP-2"),
    *(pytest.param(name, marks=pytest.mark.thorough) for name in ("Ring-4", "Ulysses-8")),
]
"""Text encoders are sharded over all ranks of a layout, whatever its axes: each number of ranks and each axis once."""
