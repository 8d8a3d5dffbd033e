"""Z-Image: every layout computes what one process computes with diffusers' untouched model."""

import pytest
import torch

from parallel_backend import ParallelismConfig
from tests.distributed import z_image_cases
from tests.errors import relative_error

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; a wrong token, head or position costs more than 1e-2."""

LAYOUTS = {
    "single": ParallelismConfig(),
    "TP-2": ParallelismConfig(tp_size=2),
    "TP-3": ParallelismConfig(tp_size=3),
    "TP-6": ParallelismConfig(tp_size=6),
    "Ring-2": ParallelismConfig(ring_size=2),
    "Ring-5": ParallelismConfig(ring_size=5),
    "Ring-8": ParallelismConfig(ring_size=8),
    "Ulysses-2": ParallelismConfig(ulysses_size=2),
    "Ulysses-6": ParallelismConfig(ulysses_size=6),
    "Ulysses-2-TP-3": ParallelismConfig(ulysses_size=2, tp_size=3),
    "Ulysses-3-TP-2": ParallelismConfig(ulysses_size=3, tp_size=2),
    "Ring-4-TP-2": ParallelismConfig(ring_size=4, tp_size=2),
    "USP-2-3": ParallelismConfig(ulysses_size=2, ring_size=3),
    "Ring-2-TP-3": ParallelismConfig(ring_size=2, tp_size=3),
}
TYPICAL = ("single", "TP-3", "Ring-5", "Ulysses-2", "USP-2-3", "Ulysses-3-TP-2")
"""Each axis alone and with another."""
ONE, PADDED_EXACTLY = [(7, (10, 6))], [(32, (16, 8)), (64, (16, 8))]
LENGTHS_AND_SIZES_THAT_DIFFER = [(33, (4, 4)), (3, (4, 4)), (33, (8, 2)), (90, (12, 14))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in TYPICAL else [pytest.mark.thorough]) for name in LAYOUTS]
)
def test_transformer(world, name):
    batches = [ONE, PADDED_EXACTLY, LENGTHS_AND_SIZES_THAT_DIFFER]
    for errors in world.run(z_image_cases.transformer_errors, LAYOUTS[name], batches):
        assert max(errors) <= TOLERANCE


def test_undone(world):
    assert max(world.run(z_image_cases.undone_error, LAYOUTS["Ulysses-2"])) == 0


@pytest.mark.parametrize("name", ["TP-3", "Ring-5", "Ulysses-3-TP-2"])
def test_cache(world, name):
    """The picture's tokens decide, padding and text do not: all layouts compute the same steps."""
    ((expected, wanted),) = world.run(z_image_cases.cached_run, LAYOUTS["single"])
    assert 2 < sum(expected) < len(expected)
    for computed, predictions in world.run(z_image_cases.cached_run, LAYOUTS[name]):
        assert computed == expected
        assert max(map(relative_error, predictions, wanted)) <= TOLERANCE
        assert all(torch.isfinite(one).all() for one in predictions)
