"""Every layout takes the cache's decisions of one process, step by step, and gives its latents."""

import functools

import pytest
import torch

from parallel_backend import ParallelismConfig
from tests.distributed import cache_cases as cases
from tests.distributed.layouts import REFERENCE_TABLE, all_layouts
from tests.errors import relative_error

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums."""

ODD, FEW = "odd lengths, a reference, batch 2", "fewer image tokens than ranks"
RUNS = {ODD: (7, [(5, 7), (3, 4)], 2), FEW: (5, [(1, 3)], 1)}


@functools.cache
def alone(run: str, order: int) -> cases.Result:
    with torch.no_grad():
        return cases.sample(None, ParallelismConfig(), *RUNS[run], cases.settings(order))


@pytest.mark.parametrize(
    ("run", "order", "name"),
    [
        *all_layouts(ODD, 0),
        # Of three image tokens some ranks get none where the sequence is cut into more than three parts.
        *all_layouts(
            FEW,
            1,
            names=[name for name, layout in REFERENCE_TABLE.items() if layout.ring_size * layout.ulysses_size > 3],
        ),
    ],
)
def test_same_decisions_and_latents_on_every_layout(world, name, run, order):
    expected = alone(run, order)
    assert 3 <= sum(expected.computed) <= cases.STEPS - 3
    measured = [diff for diff in expected.diffs if diff is not None]
    # Nowhere so near the threshold that rounding could decide.
    assert min(abs(diff - cases.THRESHOLD) for diff in measured) > 1e-3
    for result in world.run(cases.sample, REFERENCE_TABLE[name], *RUNS[run], cases.settings(order)):
        assert result.computed == expected.computed
        for ours, theirs in zip(result.diffs, expected.diffs, strict=True):
            assert ours == (theirs if theirs is None else pytest.approx(theirs, rel=1e-4))
        assert relative_error(result.latents, expected.latents) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=["TP-4", "Ulysses-2-TP-4", "TP-8", "Ulysses-4-TP-2", "Ring-2-TP-4"]))
def test_qwen_image_decides_alike_too(world, name):
    run = (11, [(5, 7), (3, 4)], 2, cases.settings(1), False, True)
    with torch.no_grad():
        expected = cases.sample(None, ParallelismConfig(), *run)
    assert 3 <= sum(expected.computed) <= cases.STEPS - 3
    assert min(abs(diff - cases.THRESHOLD) for diff in expected.diffs if diff is not None) > 1e-3
    for result in world.run(cases.sample, REFERENCE_TABLE[name], *run):
        assert result.computed == expected.computed
        assert relative_error(result.latents, expected.latents) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=["USP-2-2-TP-2", "Ring-4-TP-2", "Ulysses-4-TP-2", "Ring-8"]))
def test_one_all_reduce_and_one_host_sync_a_measured_step(world, name):
    layout, run = REFERENCE_TABLE[name], RUNS[ODD]
    mask = (1, 1, 1, *(0, 0, 1) * 3)
    static = cases.settings(0, steps_computation_mask=mask, steps_computation_policy="static", max_warmup_steps=0)
    for dynamic, fixed in zip(
        world.run(cases.sample, layout, *run, cases.settings(0)), world.run(cases.sample, layout, *run, static),
        strict=True,
    ):  # fmt: skip
        assert fixed.computed == [bool(value) for value in mask]
        # Tensor parallelism has all-reduces of its own, as many in each computed (or cached) step.
        own = {computed: count for computed, count in zip(fixed.computed, fixed.all_reduces, strict=True)}
        assert fixed.syncs == [0] * cases.STEPS
        for computed, diff, reduces, syncs in zip(
            dynamic.computed, dynamic.diffs, dynamic.all_reduces, dynamic.syncs, strict=True
        ):
            assert reduces - own[computed] == syncs == (diff is not None)


def test_ranks_whose_own_differences_disagree_decide_alike(world):
    layout = REFERENCE_TABLE["Ring-2"]
    plan = cases.settings(0, residual_diff_threshold=0.12, max_warmup_steps=1)
    (first, own_first), (second, own_second) = world.run(
        cases.local_differences, layout, 4, [(4, 8)], 1, plan, True, timeout=60
    )
    assert first == second
    # Decided by each rank alone, the ranks would part (and then wait for each other for ever).
    assert any((a < 0.12) != (b < 0.12) for a, b in zip(own_first, own_second, strict=True))


def test_what_is_no_number_on_one_rank_is_computed_on_all(world):
    # At threshold 1 each measured step is cached; the one after the broken one is compared with it, and computed too.
    run = (4, [(4, 8)], 1, cases.settings(0, residual_diff_threshold=1))
    for computed in world.run(cases.one_rank_broken, REFERENCE_TABLE["Ring-2"], *run):
        assert computed == [True] * 4 + [False] * 8


def test_the_library_on_eight_ranks(world):
    with torch.no_grad():
        expected, decisions = cases.library(None, None)
    assert 3 <= sum(decisions) <= cases.STEPS - 3
    for out, computed in world.run(cases.library, REFERENCE_TABLE["USP-2-2-TP-2"]):
        assert computed == decisions
        assert relative_error(out, expected) <= TOLERANCE
