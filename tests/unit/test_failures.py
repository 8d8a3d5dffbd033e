"""What the failures of some ranks amount to, and whether the group survives them."""

import pytest

from parallel_backend.runtime.client.failures import FRESH, failure, silence
from parallel_backend.runtime.errors import OutOfMemoryError, RequestFailedError, WorkersFailedError
from parallel_backend.runtime.wire.messages import Failed

GIB = 2**30


def failed(rank, *, bad_input=False, memory=None, collectives=7, alone=False):
    return Failed(1, rank, f"error {rank}", bad_input, f"traceback {rank}", memory, collectives, alone)


def log_of(rank):
    return f"log-{rank}"


def test_bad_input_that_all_ranks_refuse():
    error, usable = failure([failed(1, bad_input=True), failed(0, bad_input=True)], 2, log_of)
    assert (type(error), str(error), usable) == (ValueError, "error 0", True)


@pytest.mark.parametrize(
    ("failures", "ranks", "usable"),
    [
        ([failed(0)], 1, True),
        ([failed(0), failed(1)], 2, True),
        ([failed(1)], 2, False),  # the other may wait for it in a collective
        ([failed(0), failed(1, collectives=8)], 2, False),
        ([failed(0, collectives=None), failed(1, collectives=None)], 2, False),  # nobody knows
        ([failed(0, collectives=None)], 1, True),
        ([failed(0, collectives=None, alone=True)], 2, True),
        ([failed(0, alone=True), failed(1)], 3, False),
    ],
)
def test_the_group_survives_what_all_ranks_fail_at_the_same_place(failures, ranks, usable):
    error, found = failure(failures, ranks, log_of)
    assert found is usable
    assert type(error) is (RequestFailedError if usable else WorkersFailedError)
    first = failures[0].rank
    assert str(error).startswith(f"rank {first} failed: error {first}\n(log: log-{first})")
    assert (FRESH in str(error)) is not usable
    assert f"traceback {first}" in str(error)


def test_who_ran_out_of_memory_comes_first():
    error, usable = failure([failed(0, collectives=9), failed(1, memory=[3 * GIB, GIB])], 2, log_of)
    assert type(error) is OutOfMemoryError
    assert not usable
    assert str(error).startswith(
        "rank 1 ran out of memory: it asked for 3.00 GiB where 1.00 GiB were free\n(log: log-1)"
    )


def test_silence():
    assert silence({0, 2}, {0: "S", 2: "S"}, 30) == (
        "rank 0, 2 did not answer within 30 s; the logs say where each rank was",
        0,
    )
    assert silence({0, 1}, {0: "S", 1: "T"}, 5) == (
        "rank 1 is stopped (SIGSTOP), and the group did not answer within 5 s; the logs say where each rank was",
        1,
    )
    assert silence({3}, {}, 5) == ("rank 3 did not answer within 5 s; its log may say more", 3)


def waiting(rank, *others, axis="ulysses", seconds=30.0):
    return Failed(1, rank, "", False, device=f"GPU {rank}, L20", axis=axis, unreached=list(others), seconds=seconds)


class TestRanksThatDoNotReachEachOther:
    def test_a_pair(self):
        error, usable = failure([waiting(1, 0), waiting(0, 1)], 2, log_of)
        assert (type(error), usable) == (WorkersFailedError, False)
        first, *_ = str(error).splitlines()
        assert first.startswith(
            "rank 0 (GPU 0, L20) and rank 1 (GPU 1, L20) did not reach each other within 30 s, on the axis "
            "ulysses. What would help: start ComfyUI with NCCL_P2P_DISABLE=1"
        )
        assert all(word in first for word in ("IOMMU", "ACS", "driver", "'devices'"))
        assert FRESH in str(error)

    def test_one_pair_among_four(self):
        """2 and 3 are done with each other, and wait for those that wait for each other."""
        told = [waiting(0, 1, 3), waiting(1, 0, 2), waiting(2, 0), waiting(3, 1)]
        text = str(failure(told, 4, log_of)[0])
        assert text.startswith("rank 0 (GPU 0, L20) and rank 1 (GPU 1, L20) did not reach each other")

    def test_one_that_says_nothing_at_all(self):
        text = str(failure([waiting(0, 1)], 2, log_of)[0])
        assert text.startswith("rank 0 (GPU 0, L20) and rank 1 did not reach each other within 30 s")

    def test_a_whole_axis(self):
        told = [waiting(rank, *({0, 1, 2} - {rank}), axis="tp") for rank in range(3)]
        text = str(failure(told, 3, log_of)[0])
        assert text.startswith("rank 0 (GPU 0, L20), rank 1 (GPU 1, L20) and rank 2 (GPU 2, L20) did")
        assert "on the axis tp" in text

    def test_other_data_than_was_sent(self):
        text = str(failure([waiting(1, 0, seconds=0.0)], 2, log_of)[0])
        assert text.startswith("rank 0 and rank 1 (GPU 1, L20) get other data than was sent, on the axis ulysses")

    def test_on_cpus_of_several_hosts(self):
        told = [
            Failed(1, rank, "", False, device="the CPU", axis="tp", unreached=[1 - rank], seconds=3.0)
            for rank in (0, 1)
        ]
        text = str(failure(told, 2, log_of, several_hosts=True)[0])
        assert "NCCL_P2P_DISABLE" not in text
        assert "ports" in text


def test_a_device_that_failed_is_named_whatever_the_others_say():
    lost = Failed(1, 1, "AcceleratorError: CUDA error: unknown error", False, device="GPU 3, L20", device_failed=True)
    error, usable = failure([failed(0), lost], 2, log_of)
    assert (type(error), usable) == (WorkersFailedError, False)
    assert str(error).startswith("GPU 3, L20 of rank 1 failed: AcceleratorError: CUDA error: unknown error")
    # All the same on all ranks, and still nothing that could go on.
    assert not failure([lost], 1, log_of)[1]
