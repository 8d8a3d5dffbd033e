"""umT5 from one file on every number of ranks: transformers' context, tables of positions sharded by heads."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import umt5_cases
from tests.umt5_file import HEADS, HIDDEN, LAYERS, write_umt5

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums."""
RANKS_8 = ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2)


@pytest.mark.parametrize(
    ("layout", "size", "degree"),
    [
        (ParallelismConfig(), {}, 1),
        (ParallelismConfig(ulysses_size=2), {}, 2),
        (ParallelismConfig(ring_size=2, tp_size=2), {}, 4),
        (RANKS_8, {}, 8),
        (RANKS_8, {"heads": 4}, 4),
        (ParallelismConfig(ring_size=4), {"heads": 6}, 2),
        (ParallelismConfig(ulysses_size=3), {}, 1),
    ],
    ids=["1 rank", "2 ranks", "4 ranks", "8 ranks", "4 heads on 8 ranks", "6 heads on 4 ranks", "8 heads on 3 ranks"],
)
def test_the_context_is_transformers(world, tmp_path, layout, size, degree):
    path = str(write_umt5(tmp_path / "umt5.safetensors", **size))
    results = world.run(umt5_cases.encode, layout, path)
    for result in results:
        assert result["error"] <= TOLERANCE
        assert result["masked"] == 0.0
        assert (result["degree"], result["copies"]) == (degree, layout.world_size // degree)
        assert result["tables"] == size.get("heads", HEADS) // degree
    if size == {}:
        (alone,) = world.run(umt5_cases.encode, ParallelismConfig(), path)
        norms = 4 * HIDDEN * (2 * LAYERS + 1)  # which every rank has
        assert {result["held"] - norms for result in results} == {(alone["held"] - norms) // degree}


@pytest.mark.parametrize("fp8", ["cast", "stored"])
def test_weights_in_8_bits(world, tmp_path, fp8):
    path = str(write_umt5(tmp_path / "umt5.safetensors", "scaled_fp8"))
    (alone,) = world.run(umt5_cases.encode, ParallelismConfig(), path, "cast")
    for result in world.run(umt5_cases.encode, ParallelismConfig(tp_size=2), path, fp8):
        assert result["error"] <= TOLERANCE
        assert result["held"] < (0.55 if fp8 == "cast" else 0.3) * alone["held"]


def test_one_that_was_loaded_whole(world, tmp_path):
    path = str(write_umt5(tmp_path / "umt5.safetensors"))
    for error in world.run(umt5_cases.whole_and_sharded, ParallelismConfig(ring_size=4), path):
        assert error <= TOLERANCE
