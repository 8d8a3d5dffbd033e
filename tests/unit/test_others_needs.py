"""What others asked for of a GPU, what they took, and what they get the next time."""

from __future__ import annotations

import threading

import pytest

from parallel_backend.planning import others_needs
from parallel_backend.planning.others_needs import MARGIN, MARGIN_BYTES, OthersNeeds

GIB = 2**30


class Device:
    """How much is free, and who looks at it."""

    def __init__(self, free: int) -> None:
        self.now, self.looks = free, threading.Semaphore(0)

    def free(self) -> int:
        self.looks.release()
        return self.now

    def set(self, free: int) -> None:
        """Have so much be free until somebody has looked at it twice: the first look may have begun before."""
        self.now = free
        while self.looks.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.looks.acquire(timeout=20)


@pytest.fixture
def device() -> Device:
    return Device(3 * GIB)


@pytest.fixture
def needs(device) -> OthersNeeds:
    return OthersNeeds(device.free, look_seconds=0.001)


def picture(needs: OthersNeeds, device: Device, required: int, takes: int, keeps: int = 0) -> int:
    """Somebody who wants so much to be free, and takes less: what it is given where 3 GiB are free."""
    device.now = 3 * GIB
    given = needs.to_give(required - device.now, device.now) if required > device.now else 0
    device.now += given
    needs.given(required, given, device.now)
    device.set(device.now - takes)
    device.now += takes - keeps
    assert needs.finish()
    return given


def test_what_was_never_asked_for_before_is_given(needs):
    assert needs.to_give(2 * GIB, 3 * GIB) == 2 * GIB


def test_the_next_time_it_is_what_was_taken(needs, device):
    assert picture(needs, device, required=6 * GIB, takes=2 * GIB) == 3 * GIB
    for _ in range(3):
        assert picture(needs, device, required=6 * GIB, takes=2 * GIB) == 0
    # About as much is the same; something else is not.
    assert needs.to_give(3 * GIB + 10 * 2**20, 3 * GIB) == 0
    assert needs.to_give(4 * GIB, 3 * GIB) == 4 * GIB
    # Where less is free than it takes, the rest is given, with a margin.
    assert needs.to_give(5 * GIB, GIB) == round(2 * GIB * MARGIN) + MARGIN_BYTES - GIB


def test_who_takes_more_another_time_gets_more(needs, device):
    picture(needs, device, required=6 * GIB, takes=GIB)
    picture(needs, device, required=6 * GIB, takes=3 * GIB - 2**28)
    assert needs.to_give(5 * GIB, GIB) > 2 * GIB
    picture(needs, device, required=6 * GIB, takes=GIB)  # what it needed once it may need again
    assert needs.to_give(5 * GIB, GIB) > 2 * GIB


def test_who_takes_all_gets_all_that_it_asks_for(needs, device):
    picture(needs, device, required=6 * GIB, takes=GIB)
    picture(needs, device, required=6 * GIB, takes=3 * GIB)  # there was no more
    assert needs.to_give(3 * GIB, 3 * GIB) == 3 * GIB


def test_several_requests_before_memory_is_taken_back(needs, device):
    """Which of them took it is not known: what is taken counts for each, and the second finds what the first left."""
    device.now = 6 * GIB
    needs.given(6 * GIB, 3 * GIB, 6 * GIB)
    device.set(2 * GIB)
    device.now = 3 * GIB
    needs.given(4 * GIB, GIB, 3 * GIB)
    device.set(GIB)
    needs.finish()
    enough = round(6 * GIB * MARGIN) + MARGIN_BYTES
    assert needs.to_give(6 * GIB, 0) == 6 * GIB < enough
    assert needs.to_give(4 * GIB, 0) == 4 * GIB


def test_nothing_is_learned_where_nobody_could_look(needs, device, monkeypatch):
    def broken() -> int:
        raise RuntimeError("CUDA error")

    needs.given(6 * GIB, 3 * GIB, 6 * GIB)
    needs._watch._free = broken
    needs._watch._thread.join(20)
    assert needs.finish()
    assert needs.to_give(3 * GIB, 3 * GIB) == 3 * GIB
    monkeypatch.setattr(others_needs, "WATCH_SECONDS", 0.0)
    needs.given(6 * GIB, 3 * GIB, 6 * GIB)
    needs._watch._thread.join(20)
    assert needs.finish()
    assert needs.to_give(3 * GIB, 3 * GIB) == 3 * GIB


def test_nothing_to_finish(needs):
    assert not needs.finish()


def test_as_many_requests_as_are_kept(needs, device, monkeypatch):
    monkeypatch.setattr(others_needs, "KEPT", 2)
    for size in (6, 8, 10):
        picture(needs, device, required=size * GIB, takes=GIB)
    assert [needs.to_give((size - 3) * GIB, 3 * GIB) == 0 for size in (6, 8, 10)] == [False, True, True]
