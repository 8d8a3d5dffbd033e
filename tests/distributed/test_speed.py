"""What makes a step fast, as far as CPU ranks can prove it: what runs under what, and one compiled graph for all."""

import pytest

from tests.distributed import speed_cases
from tests.distributed.layouts import REFERENCE_TABLE
from tests.distributed.test_parity import TOLERANCE

LONG = {"piece": 14}
"""Tokens of an MLP's piece, so that all of the sizes are many tokens."""
DOUBLE, SINGLE = "Flux2TransformerBlock", "Flux2SingleTransformerBlock"


def under(events, start, nth=0):
    """What is launched between the n-th start of something and the wait for it; waits are in the order of starts."""
    starts = [at for at, event in enumerate(events) if event in ("exchange", "sum")]
    waits = [at for at, event in enumerate(events) if event == "wait"]
    number = [at for at in starts if events[at] == start][nth]
    return events[number + 1 : waits[starts.index(number)]]


def check_single_block_under_ulysses(events):
    # q, k and v are on their way while gate and up are computed, the output while the MLP half of the output is.
    assert under(events, "exchange", 0) == ["GEMM"]
    assert under(events, "exchange", 1)[0] == "GEMM"
    assert "attention" not in under(events, "exchange", 1)
    assert events.count("exchange") == 2


class TestEager:
    def test_ulysses(self, world):
        for events in world.run(speed_cases.eager_order, REFERENCE_TABLE["Ulysses-2"]):
            check_single_block_under_ulysses(events[SINGLE])
            assert events[DOUBLE].count("exchange") == 2

    def test_ulysses_and_tp(self, world):
        for events in world.run(speed_cases.eager_order, REFERENCE_TABLE["Ulysses-4-TP-2"]):
            check_single_block_under_ulysses(events[SINGLE])
            assert "GEMM" in under(events[SINGLE], "sum", 0)

    def test_tp(self, world):
        for events in world.run(speed_cases.eager_order, REFERENCE_TABLE["TP-2"]):
            # Both products of the second piece, under the sum of the first.
            assert under(events[SINGLE], "sum", 0) == ["GEMM", "GEMM", "sum"]
            # Of the image's output in two pieces, the text's output, and the same of both MLPs.
            sums = [under(events[DOUBLE], "sum", nth) for nth in range(6)]
            assert "GEMM" in sums[0]
            assert sums[2].count("GEMM") == 3  # the text's output, under all of the image's MLP
            assert all("GEMM" in part for part in sums[:5])

    def test_many_tokens(self, world):
        # 36 tokens of each rank: six in two small pieces, of two products each, under the way there, 30 under the way
        # back.
        for events in world.run(speed_cases.eager_order, REFERENCE_TABLE["Ulysses-2"], piece=6):
            assert under(events[SINGLE], "exchange", 0) == ["GEMM"] * 4
            assert under(events[SINGLE], "exchange", 1) == ["GEMM"] * 10
        for events in world.run(speed_cases.eager_order, REFERENCE_TABLE["TP-2"], piece=6):
            # The second half of the 72 tokens goes through all of the MLP, and out, under the sum of the first.
            assert under(events[SINGLE], "sum", 0) == ["GEMM"] * 13 + ["sum"]

    def test_nothing_lingers(self, world):
        for found in world.run(speed_cases.lingering, REFERENCE_TABLE["Ulysses-2"], piece=6):
            assert found["sent"] == [0] * 4  # two blocks of each kind
            # A rank's 32 image tokens in each double-stream block, and 6 in two small pieces and 30 in each single one.
            assert found["pieces"] == [0] * (2 * 5 + 2 * (2 + 5))

    @pytest.mark.parametrize("name", ["Ring-2", "Ring-4"])
    def test_ring(self, world, name):
        degree = REFERENCE_TABLE[name].ring_size
        for events in world.run(speed_cases.eager_order, REFERENCE_TABLE[name]):
            single = events[SINGLE]
            assert single.count("exchange") == degree - 1
            # The first hop runs under gate and up too, each of them under a chunk's attention.
            assert under(single, "exchange", 0) == ["GEMM", "attention"]
            for hop in range(1, degree - 1):
                assert under(single, "exchange", hop) == ["attention"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Ring-2", {}),
        ("TP-2", LONG),
        pytest.param("Ulysses-2", {}, marks=pytest.mark.thorough),  # with copies it is compiled in each run
        pytest.param("Ulysses-2", LONG, marks=pytest.mark.thorough),
        pytest.param("TP-2", {}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_compiled(world, name, changes):
    """One graph a kind of block, for all sizes, that launches things in the order in which eager code does."""
    for rank in world.run(speed_cases.compiled, REFERENCE_TABLE[name], timeout=300, **changes):
        assert max(rank["errors"]) <= TOLERANCE
        assert rank["breaks"] == {}
        assert set(rank["graphs"]) == {2}
        _, single = rank["order"]
        if name == "Ulysses-2":
            check_single_block_under_ulysses(single)
        elif name == "TP-2":
            assert under(single, "sum", 0) == ["GEMM", "GEMM", "sum"]
        else:
            assert under(single, "exchange", 0) == ["GEMM", "attention"]
