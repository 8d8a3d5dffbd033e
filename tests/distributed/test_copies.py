"""Blocks over exchanges by copy engines, with CPU ranks in the place of GPUs: nothing is read before it is there."""

import pytest

from parallel_backend.config import Speed
from tests.distributed import copies_cases
from tests.distributed.layouts import REFERENCE_TABLE
from tests.distributed.test_parity import TOLERANCE

HEADS_OF_24 = {"attention_head_dim": 24, "axes_dims_rope": (4, 8, 8, 4)}
"""No power of two, so that no kernel of ours packs them."""


@pytest.mark.parametrize("name", ["Ulysses-2", "TP-2", "Ring-4", "Ulysses-4-TP-2", "USP-2-2-TP-2"])
def test_eager(world, name):
    for errors in world.run(copies_cases.errors, REFERENCE_TABLE[name], Speed()):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Ulysses-2", HEADS_OF_24),
        *(pytest.param(name, {}, marks=pytest.mark.thorough) for name in ("Ulysses-2", "TP-2")),
        pytest.param("Ring-2", HEADS_OF_24, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_compiled(world, name, changes):
    for errors in world.run(copies_cases.errors, REFERENCE_TABLE[name], Speed(compile=True), timeout=300, **changes):
        assert max(errors) <= TOLERANCE
