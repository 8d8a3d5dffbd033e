"""Ranks make room as one: what leaves on the fullest one leaves on all, or the next collective would hang."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import eviction_cases
from tests.tiny_pipeline import make_tiny_pipeline

LAYOUT = ParallelismConfig(ulysses_size=2, tp_size=2)


@pytest.mark.parametrize("fullest", [0, 3])
@pytest.mark.parametrize(
    ("size", "leaving", "left"), [(5, 0, 5), (6, 1, 15), (25, 2, 25), (35, 3, 35)], ids=["none", "one", "two", "all"]
)
def test_the_fullest_rank_decides_for_all(world, fullest, size, leaving, left):
    for places, error, available in world.run(eviction_cases.make_room, LAYOUT, size, fullest):
        assert error == ""
        assert places == ["file"] * leaving + ["device"] * (3 - leaving)
        assert available == left


def test_what_fits_on_all_but_one_is_refused_on_all(world):
    errors = {error for _, error, _ in world.run(eviction_cases.make_room, LAYOUT, 36, 2)}
    assert len(errors) == 1
    assert "the next part needs" in errors.pop()


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_of_one_rank_is_raised_on_all(world, failing):
    """Or the others would wait for it, and the group would have to end."""
    found = world.run(eviction_cases.fail_alone, LAYOUT, failing, MemoryError("none left"))
    others = ("AnotherRankError", f"rank {failing} failed: MemoryError: none left")
    assert found == [("MemoryError", "none left") if rank == failing else others for rank in range(4)]
    assert world.run(eviction_cases.fail_alone, LAYOUT, failing, ValueError("bad")) == [("ValueError", "bad")] * 4


@pytest.mark.parametrize(
    ("layout", "component"),
    [(LAYOUT, "vae"), (ParallelismConfig(tp_size=2), "transformer")],
    ids=["what one rank alone loads", "what each rank loads a part of"],
)
def test_a_rank_without_memory_for_its_part(world, tmp_path, layout, component):
    pipeline = str(make_tiny_pipeline(tmp_path / "tiny"))
    first, *others = world.run(eviction_cases.load_without_memory, layout, pipeline, component)
    assert first == ("MemoryError", "file")
    assert set(others) == {("AnotherRankError", "file")}


@pytest.mark.parametrize(
    ("layout", "lender"), [(LAYOUT, 2), (ParallelismConfig(ring_size=2), 1), (ParallelismConfig(tp_size=2), 0)]
)
def test_what_one_rank_lends_comes_back_there_alone(world, tmp_path, layout, lender):
    """On that device only; the same is computed as before, to the bit."""
    pipeline = str(make_tiny_pipeline(tmp_path / "tiny"))
    for rank, (lent, equal, back) in enumerate(world.run(eviction_cases.lend, layout, pipeline, lender)):
        assert [size > 0 for size in lent] == [rank == lender] * 2
        assert lent[0] == lent[1]
        assert equal
        assert back


def test_a_rank_without_memory_for_what_it_is_shown(world):
    assert world.run(eviction_cases.see_without_memory, LAYOUT) == ["MemoryError", *["AnotherRankError"] * 3]
