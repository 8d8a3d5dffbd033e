"""Where ranks connect: those that belong to the group are let in, everybody else is turned away and holds nobody up."""

import contextlib
import os
import socket
import tempfile
import time

import pytest

from parallel_backend.runtime.wire import handshake as reception
from parallel_backend.runtime.wire.channel import Channel
from parallel_backend.runtime.wire.handshake import Handshakes
from parallel_backend.runtime.wire.messages import Done, Hello


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen(8)
        yield listener


@pytest.fixture
def front(listener):
    front = Handshakes(listener, range(2))
    yield front
    front.close()


def connect(listener) -> Channel:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(listener.getsockname())
    return Channel(connection)


def arrivals(front, rounds=4):
    return [hello for _ in range(rounds) for hello, _ in front.arrivals(0.02)]


def assert_left(channel: Channel) -> None:
    channel.socket.settimeout(2)
    assert channel.socket.recv(1) == b""


def test_ranks_come_in_any_order(listener, front):
    channels = [connect(listener) for _ in range(2)]
    for rank, channel in zip((1, 0), channels, strict=True):
        channel.send(Hello(rank, os.getpid()))
    assert [hello.rank for hello in arrivals(front)] == [1, 0]


@pytest.mark.parametrize(
    "message",
    [Hello(2, os.getpid()), Hello(-1, os.getpid()), Hello(0, os.getpid() + 1), Done(1, 0, 0.5)],
    ids=["a rank too many", "a rank below 0", "another process's id", "no greeting"],
)
def test_who_is_no_rank_is_turned_away(listener, front, message):
    stranger = connect(listener)
    stranger.send(message)
    assert arrivals(front) == []
    assert_left(stranger)


def test_what_is_no_message(listener, front):
    stranger = connect(listener)
    stranger.socket.send(b"GET / HTTP/1.1\r\n\r\n")
    assert arrivals(front) == []
    assert_left(stranger)


def test_a_rank_that_is_there_already(listener, front):
    first, second = connect(listener), connect(listener)
    first.send(Hello(0, os.getpid()))
    assert [hello.rank for hello in arrivals(front)] == [0]
    second.send(Hello(0, os.getpid()))
    assert arrivals(front) == []
    assert_left(second)


def test_who_says_nothing_delays_nobody_and_is_sent_away(listener, front, monkeypatch):
    monkeypatch.setattr(reception, "HELLO_SECONDS", 0.3)
    silent, rank = connect(listener), connect(listener)
    rank.send(Hello(1, os.getpid()))
    assert [hello.rank for hello in arrivals(front)] == [1]
    time.sleep(0.4)
    assert arrivals(front) == []
    assert_left(silent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_process_is_turned_away():
    with (
        tempfile.TemporaryDirectory(prefix="reception-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        os.chmod(folder, 0o755)
        listener.bind(f"{folder}/control")
        os.chmod(listener.getsockname(), 0o666)
        listener.listen(8)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setuid(65534)
                stranger = connect(listener)
                stranger.send(Hello(0, os.getpid()))
                stranger.socket.settimeout(10)
                with contextlib.suppress(ConnectionResetError):  # its greeting was not even read
                    assert stranger.socket.recv(1) == b""
                code = 0
            finally:
                os._exit(code)
        front = Handshakes(listener, range(2))
        arrived = []
        deadline = time.monotonic() + 10
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            arrived += arrivals(front)
        front.close()
        assert ended == (child, 0)
        assert arrived == []
