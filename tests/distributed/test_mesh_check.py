"""Ranks find out whether they reach each other on every axis, and who does not."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import mesh_check_cases
from tests.distributed.layouts import REFERENCE_TABLE, all_layouts

SECONDS = 0.3
ULYSSES_2 = ParallelismConfig(ulysses_size=2)
MIXED = ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2)


@pytest.mark.parametrize("name", all_layouts())
def test_ranks_that_reach_each_other(world, name):
    layout = REFERENCE_TABLE[name]
    split = [axis for axis in ("ulysses", "ring", "tp") if getattr(layout, f"{axis}_size") > 1]
    split += ["ring and ulysses"] * (layout.cp_size > 1)
    split += ["all ranks"] * (layout.cp_size > 1 and layout.tp_size > 1)
    assert world.run(mesh_check_cases.check, layout) == [([], split)] * layout.world_size


@pytest.mark.parametrize(
    ("axis", "waiting"),
    [
        # Ranks are [ring, ulysses, tp]: 5 has 4 beside it on tp, 7 on ulysses and 1 on ring.
        ("tp", {4: {5}, 5: {4}}),
        ("ulysses", {7: {5}, 5: {7}}),
        ("ring", {1: {5}, 5: {1}}),
        ("ring and ulysses", {rank: {1, 3, 5, 7} - {rank} for rank in (1, 3, 5, 7)}),
        ("all ranks", {rank: set(range(8)) - {rank} for rank in range(8)}),
    ],
)
def test_a_rank_that_does_not_answer_is_told_by_who_waits_for_it(world, axis, waiting):
    found = {}
    for rank, (told, _) in enumerate(world.run(mesh_check_cases.check, MIXED, SECONDS, axis, 5)):
        on_axis = [unreached for unreached in told if unreached.axis == axis]
        if on_axis:
            (unreached,) = on_axis
            found[rank] = set(unreached.ranks)
            assert unreached.seconds == SECONDS
    assert found == waiting


def test_of_a_larger_axis_the_pair_is_told(world):
    """One partner after the other: the late rank's neighbours wait for it, and the others for these at most."""
    answers = world.run(mesh_check_cases.check, ParallelismConfig(ulysses_size=4), SECONDS, "ulysses", 2)
    waits = {rank: set(told[0].ranks) if told else set() for rank, (told, _) in enumerate(answers)}
    assert waits[2] == {1, 3}
    assert waits[1] == waits[3] == {0, 2}
    assert 2 in waits[0] or not waits[0]


def test_what_arrives_is_compared_with_what_was_sent(world):
    assert world.run(mesh_check_cases.disturbed, ParallelismConfig(ring_size=4), 1) == [(), (), (1,), ()]


def test_a_rank_that_is_busy_with_something_else_is_waited_for(world):
    """Such as a picture that was cancelled: the deadline is one of exchanges alone."""
    for told, took in world.run(mesh_check_cases.busy, ParallelismConfig(tp_size=8), SECONDS):
        assert told == []
        assert took > 2 * SECONDS
