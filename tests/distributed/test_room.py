"""Ranks make room as one: what leaves on the fullest one leaves on all, or the next collective would hang."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import room_cases

LAYOUT = ParallelismConfig(ulysses_size=2, tp_size=2)


@pytest.mark.parametrize("fullest", [0, 3])
@pytest.mark.parametrize(
    ("size", "leaving", "left"), [(5, 0, 5), (6, 1, 15), (25, 2, 25), (35, 3, 35)], ids=["none", "one", "two", "all"]
)
def test_the_fullest_rank_decides_for_all(world, fullest, size, leaving, left):
    for places, error, available in world.run(room_cases.make_room, LAYOUT, size, fullest):
        assert error == ""
        assert places == ["file"] * leaving + ["device"] * (3 - leaving)
        assert available == left


def test_what_fits_on_all_but_one_is_refused_on_all(world):
    errors = {error for _, error, _ in world.run(room_cases.make_room, LAYOUT, 36, 2)}
    assert len(errors) == 1
    assert "the next part needs" in errors.pop()
