"""Process groups are made once for the same ranks, and all of them count when ranks are asked how far they came."""

from parallel_backend import ParallelismConfig
from tests.distributed import group_cases

ULYSSES_8 = ParallelismConfig(ulysses_size=8)
LAYOUTS = [
    ULYSSES_8,
    ParallelismConfig(ring_size=4, tp_size=2),
    ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2),
]


def test_loading_again_leaves_nothing_behind(world):
    for first, *later in world.run(group_cases.held_after_loads, ULYSSES_8, LAYOUTS, 4):
        assert later == [first] * 3


def test_axes_over_the_same_ranks_share_a_group(world):
    assert all(world.run(group_cases.shared, ULYSSES_8))


def test_collectives_within_the_text_encoder_count(world):
    assert world.run(group_cases.counted, ULYSSES_8) == [1] * 8
