"""A rank's pulse: what counts as getting on with a request, and what does not."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace

import pytest
import torch

from parallel_backend.parallel import signs
from parallel_backend.runtime.rank import pulse as pulses
from parallel_backend.runtime.rank.device_failure import describe_device, device_failed
from parallel_backend.runtime.rank.pulse import COMPILE_SECONDS, Pulse, cpu_seconds
from parallel_backend.runtime.wire.channel import MOST_UNREAD, Channel
from parallel_backend.runtime.wire.messages import Done, Progress


@pytest.fixture
def machine(monkeypatch):
    """A clock, seconds of CPU that this process has worked, and whether it is in the compiler."""
    state = SimpleNamespace(now=0.0, worked=0.0, compiling=False)
    monkeypatch.setattr(pulses, "cpu_seconds", lambda: state.worked)
    monkeypatch.setattr(pulses, "_in_compiler", lambda frame: state.compiling)
    return state


def make(machine, on_cpu):
    pulse = Pulse(1000.0, on_cpu, lambda: None, lambda: machine.now)
    return pulse


def later(machine, seconds, worked=0.0):
    machine.now += seconds
    machine.worked += worked


@pytest.mark.parametrize("on_cpu", [True, False])
def test_blocks_are_signs_everywhere(machine, on_cpu):
    pulse = make(machine, on_cpu)
    with pulse.watched(True):
        later(machine, 5)
        assert not pulse.beats()
        signs.block(torch.device("cpu"))
        later(machine, 5)
        assert pulse.beats()
        later(machine, 5)
        assert not pulse.beats()


def test_work_of_the_cpu_counts_where_it_is_the_device(machine):
    """A process that waits for a GPU is busy all the time."""
    for on_cpu in (True, False):
        pulse = make(machine, on_cpu)
        with pulse.watched(True):
            later(machine, 5, worked=4)
            assert pulse.beats() is on_cpu
            later(machine, 5, worked=0.1)
            assert not pulse.beats()


def test_compiling_counts_while_it_is_at_work_and_not_for_ever(machine):
    pulse = make(machine, on_cpu=False)
    machine.compiling = True
    with pulse.watched(True):
        for _ in range(int(COMPILE_SECONDS) // 10):
            later(machine, 10, worked=9)
            assert pulse.beats()
        later(machine, 10, worked=9)
        assert not pulse.beats()
    with pulse.watched(True):  # another request, another time
        later(machine, 10, worked=9)
        assert pulse.beats()
        later(machine, 10)
        assert not pulse.beats()


def test_the_compiler_is_known_by_its_files():
    namespace: dict = {}
    code = compile("def run(look): return look()", "/somewhere/torch/_inductor/codecache.py", "exec")
    exec(code, namespace)

    def look():
        import sys

        return pulses._in_compiler(sys._getframe())

    assert namespace["run"](look)
    assert not look()


def test_work_of_this_process_is_seen():
    began = cpu_seconds()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert cpu_seconds() - began > 0.2


def test_it_tells_by_itself_while_a_request_is_watched():
    told = []
    pulse = Pulse(0.01, False, lambda: told.append(1))
    with pulse.watched(True):
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            signs.give()
            time.sleep(0.005)
    assert told


def test_events_of_a_gpu_are_signs_once_they_have_passed(monkeypatch):
    passed = []

    class Event:
        def record(self):
            pass

        def query(self):
            return self in passed

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    signs.watch(True)
    signs.block(torch.device("cuda"))
    signs.block(torch.device("cuda"))
    before = signs.count()
    assert signs.count() == before
    passed.append(signs._events[0])
    assert signs.count() == before + 1
    assert signs.count() == before + 1
    signs.watch(False)
    signs.block(torch.device("cuda"))
    assert not signs._events


def test_pulses_that_nobody_reads_leave_room_for_an_answer():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, client = Channel(ours, send_seconds=1.0), Channel(theirs)
    for beat in range(5000):
        channel.try_to_send(Progress(0, beat, 0))
    channel.send(Done(7, 0, 1.0, {"text": "x" * MOST_UNREAD}))
    received = [client.receive()[0]]
    while not isinstance(received[-1], Done):
        received.append(client.receive()[0])
    assert 10 < len(received) < 5000
    client.close()
    channel.try_to_send(Progress(0, 1, 0))  # nobody is there any more: no error
    channel.close()


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("NCCL error in: ..., unhandled cuda error (run with NCCL_DEBUG=INFO)"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("bad"), False),
    ],
)
def test_errors_after_which_a_gpu_does_nothing(error, failed):
    assert device_failed(error) is failed


def test_a_gpu_is_called_what_its_user_calls_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "L20")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert describe_device(torch.device("cuda", 1), 1) == "GPU 5, L20"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert describe_device(torch.device("cuda", 1), 1) == "GPU 1, L20"
    assert describe_device(torch.device("cpu"), 1) == "the CPU"
