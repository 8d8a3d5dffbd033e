"""The ring of buffers: jobs come out in order, however long each takes, and no buffer is filled while it is in use."""

import random
import threading
import time
from pathlib import Path

import pytest
import torch

from parallel_backend.loading import staging
from parallel_backend.loading.file_reader import Slice
from parallel_backend.loading.safetensors_reader import StoredTensor
from parallel_backend.loading.staging import BUFFERS, Job, Ring

CPU = torch.device("cpu")


def job(owner, size, value, into=None):
    """``size`` bytes that a `Reader` makes ``value``."""
    return Job(owner, Slice(StoredTensor(Path("file"), str(value), (size,), size, "U8", 0), 0, size), 0, into)


class Reader:
    """Fills buffers with the values that jobs ask for, each after another time; counts those at work."""

    def __init__(self, fails=()):
        self.fails, self.started, self.lock, self.draw = fails, 0, threading.Lock(), random.Random(0)

    def __call__(self, part, into):
        with self.lock:
            self.started += 1
            wait = self.draw.random() * 0.005
        time.sleep(wait)
        value = int(part.tensor.key)
        if value in self.fails:
            raise ValueError(f"{value} cannot be read")
        into[:] = value


def test_jobs_come_in_order_with_their_bytes(monkeypatch):
    monkeypatch.setattr(staging, "BUFFER_BYTES", 64)
    draw = random.Random(1)
    sizes = [draw.choice([0, 1, 7, 64, 65, 1000]) for _ in range(100)]  # some are larger than a buffer
    jobs = [job(str(index // 7), size, index) for index, size in enumerate(sizes)]
    seen = 0
    with Ring(iter(jobs), Reader(), CPU) as ring:
        for owner in range(15):
            for found, data in ring.of(str(owner)):
                assert found is jobs[seen]
                assert data.tolist() == [seen] * sizes[seen]
                seen += 1
            assert seen == min(100, 7 * (owner + 1))


def test_a_buffer_is_not_filled_again_while_it_is_used():
    reader = Reader()
    with Ring((job("all", 100, value) for value in range(BUFFERS * 3)), reader, CPU) as ring:
        for value, (_, data) in enumerate(ring.of("all")):
            time.sleep(0.02)  # the others are all read by now
            assert reader.started <= BUFFERS + value
            assert data.tolist() == [value] * 100
    assert reader.started == BUFFERS * 3


def test_the_ring_has_so_many_buffers_and_no_more(monkeypatch):
    buffers = set()
    with Ring((job("all", 100, value % 200) for value in range(BUFFERS * 5)), Reader(), CPU) as ring:
        for _, data in ring.of("all"):
            buffers.add(data.data_ptr())
    assert len(buffers) == BUFFERS


def test_bytes_that_stay_as_they_are_need_no_buffer(monkeypatch):
    monkeypatch.setattr(torch, "empty", None)
    place = torch.zeros(30, dtype=torch.uint8)
    jobs = [job("one", 10, 1, place[:10]), job("one", 20, 2, place[10:])]
    with Ring(iter(jobs), Reader(), CPU) as ring:
        assert [data.data_ptr() for _, data in ring.of("one")] == [place.data_ptr(), place.data_ptr() + 10]
    assert place.tolist() == [1] * 10 + [2] * 20


def test_jobs_are_made_when_there_is_room_for_them():
    made = 0

    def jobs():
        nonlocal made
        for value in range(200):
            made += 1
            yield job("all", 1, value)

    with Ring(jobs(), Reader(), CPU) as ring:
        assert made == BUFFERS
        for done, _ in enumerate(ring.of("all")):
            assert made == min(200, BUFFERS + done)


def test_after_an_error_nothing_more_is_read():
    taken = []
    reader = Reader(fails={20})

    def jobs():
        for value in range(200):
            taken.append(value)
            yield job(str(value // 10), 5, value)

    with Ring(jobs(), reader, CPU) as ring:
        for owner in ("0", "1"):
            assert len(list(ring.of(owner))) == 10
        with pytest.raises(ValueError, match="20 cannot be read"):
            list(ring.of("2"))
        assert list(ring.of("2")) == list(ring.of("3")) == []
    assert len(taken) <= 20 + BUFFERS


def test_leaving_early_waits_for_what_is_being_read():
    with Ring((job("all", 5, value) for value in range(100)), Reader(), CPU) as ring:
        next(ring.of("all"))
    assert threading.active_count() == 1 or not any("read-weights" in thread.name for thread in threading.enumerate())


class Event:
    """Stands in for a CUDA event: records which stream's work is to be waited for, and whether it was."""

    log: list = []  # noqa: RUF012

    def __init__(self, blocking):
        assert blocking

    def record(self, stream):
        self.log.append(("recorded", stream, id(self)))

    def synchronize(self):
        self.log.append(("waited", None, id(self)))


def test_on_a_gpu_a_buffer_waits_for_the_copies_from_it(monkeypatch):
    """The order of CUDA calls, with stand-ins for them; tests/gpu has the real ones."""
    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    empty, pinned = torch.empty, []

    def allocate(size, dtype, pin_memory):
        pinned.append(pin_memory)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", allocate)
    gpu = torch.device("cuda", 3)
    with Ring((job("all", 10, value % 200) for value in range(BUFFERS * 2)), Reader(), gpu) as ring:
        for value, (_, data) in enumerate(ring.of("all")):
            assert data.tolist() == [value] * 10
            before = len([entry for entry in Event.log if entry[0] == "recorded"])
            assert before == value  # the copies from this buffer are not waited for before they are queued
    assert pinned == [True] * BUFFERS
    assert set(used) == {gpu}
    assert {stream for kind, stream, _ in Event.log if kind == "recorded"} == {"stream of cuda:3"}
    # Each buffer was used twice, and waited in between.
    for event in {entry[2] for entry in Event.log}:
        assert [kind for kind, _, one in Event.log if one == event] == ["recorded", "waited", "recorded"]
