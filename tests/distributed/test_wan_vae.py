"""Wan's VAEs over several ranks: equal to the whole, in a share of the work and of the memory, also after a failure."""

import itertools

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.mesh import SINGLE, Axis
from tests.distributed import wan_vae_cases
from tests.wan_vae import CONFIGS, WAN_22, cost, write_wan_vae

TOLERANCE = 1e-4
RANKS = {
    1: ParallelismConfig(),
    2: ParallelismConfig(tp_size=2),
    3: ParallelismConfig(ring_size=3),
    4: ParallelismConfig(ulysses_size=2, ring_size=2),
    8: ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2),
}


SIZES = [(1, (5, 7)), (2, (7, 5)), (3, (8, 11)), (4, (5, 9)), (4, (2, 3)), (8, (11, 6)), (8, (3, 1))]
FEW = {("2.1", 1, (5, 7)), ("2.1", 2, (7, 5)), ("2.1", 3, (8, 11)), ("2.1", 4, (2, 3)), ("2.2", 4, (5, 9))}
"""Of these in every run; of all in a thorough one."""


def _cases():
    for kind, (ranks, size) in itertools.product(CONFIGS, SIZES):
        marks = [] if (kind, ranks, size) in FEW else [pytest.mark.thorough]
        yield pytest.param(kind, ranks, size, marks=marks, id=f"{kind}, {ranks} ranks, {size[0]}x{size[1]}")


@pytest.mark.parametrize(("kind", "ranks", "size"), list(_cases()))
def test_it_is_the_whole(world, kind, ranks, size):
    """Rows or columns that do not divide, and fewer of them than ranks."""
    for decoding, encoding in world.run(wan_vae_cases.both_ways, RANKS[ranks], kind, size):
        assert decoding <= TOLERANCE
        assert encoding <= TOLERANCE


def test_batches_and_single_frames(world):
    for frames, batch in ((1, 3), (2, 2)):
        results = world.run(wan_vae_cases.both_ways, RANKS[2], "2.1", (4, 6), frames, batch)
        assert max(error for result in results for error in result) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "decodes"),
    [
        ("2.1", True),
        pytest.param("2.1", False, marks=pytest.mark.thorough),
        pytest.param("2.2", True, marks=pytest.mark.thorough),
        ("2.2", False),
    ],
)
def test_a_rank_that_fails_keeps_no_other_waiting(world, kind, decodes):
    """Wherever it fails, the others come to the end of the piece, and all are ready for the next clip."""
    moments = [1, 2, 60, 200, 350, 500, 10_000]
    *others, failing = world.run(wan_vae_cases.after_failures, RANKS[4], kind, decodes, moments)
    ends = [end for end, _ in failing]
    assert ends[:4] == ["out of memory"] * 4
    assert ends[-1] == "done"
    for results in (*others, failing):
        assert all(error <= TOLERANCE for _, error in results)
    assert all(end == "done" for results in others for end, _ in results)


def test_a_component_that_failed_on_one_rank(world, tmp_path):
    """All ranks hear of it, none is left waiting, and a piece that follows what is gone is refused."""
    path = str(write_wan_vae(tmp_path / "vae.safetensors"))
    *others, failing = world.run(wan_vae_cases.component_after_a_failure, RANKS[4], path)
    assert failing["first"][0] == "OutOfMemoryError"
    for result in others:
        assert result["first"][0] == "AnotherRankError"
        assert "out of memory" in result["first"][1]
    (alone,) = world.run(wan_vae_cases.component_after_a_failure, RANKS[1], path)
    for result in (*others, failing):
        assert result["agreed"]
        assert "run the graph again" in result["gone"][1]
        assert "run the graph again" in result["forgotten"][1]
        assert result["error"] <= TOLERANCE
        assert result["later"] == 4 * result["workspace"] == alone["workspace"]


@pytest.mark.parametrize("config", [{}, WAN_22], ids=["2.1", "2.2"])
def test_the_share_of_work_and_memory(config):
    """True widths, 720p: on meta tensors, counted."""
    with torch.no_grad():
        alone = cost(config, SINGLE, True, (704, 1280))
        of_four = cost(config, Axis(None, 4, 1), True, (704, 1280))
        of_eight = cost(config, Axis(None, 8, 1), True, (704, 1280))
        encoding = [cost(config, axis, False, (704, 1280))[0] for axis in (SINGLE, Axis(None, 4, 1))]
    assert of_four[0] <= 0.26 * alone[0]
    assert of_four[1] <= 0.35 * alone[1]
    assert of_eight[0] <= 0.13 * alone[0]
    assert encoding[1] <= 0.26 * encoding[0]
