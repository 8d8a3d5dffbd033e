"""Whatever arrives on a socket of ranks and their client: a message, or an error, and nothing is left open."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel_backend.planning.devices import Devices
from parallel_backend.runtime.client.worker_group import WorkerGroup
from parallel_backend.runtime.errors import RequestFailedError, WorkersFailedError
from parallel_backend.runtime.group_config import GroupConfig
from parallel_backend.runtime.wire.channel import Channel
from parallel_backend.runtime.wire.messages import BadMessageError, Message, Stats, decode, encode
from parallel_backend.runtime.wire.shared_tensors import SharedTensors, pack
from tests.unit.test_channel import EVERY_MESSAGE

from .spoiled import TRIED, changed


def tensors_to_send() -> SharedTensors:
    return pack({"x": torch.ones(2, 3), "mask": torch.ones(4, dtype=torch.int64), "none": torch.ones(0, 5)})


def _specs() -> list[dict[str, Any]]:
    shared = tensors_to_send()
    shared.close()
    return shared.tensors


SPECS = _specs()


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """Bytes that may be a message: noise, a message with a change in it, or one that is cut or has noise in it."""
    message = draw(st.sampled_from(EVERY_MESSAGE))
    kind = draw(st.sampled_from(["noise", "changed", "cut", "deep"]))
    if kind == "noise":
        return draw(st.binary(min_size=1, max_size=200))
    if kind == "deep":
        return b'{"type": ' + b"[" * draw(st.integers(1, 60_000))
    data = encode(message, SPECS)
    if kind == "changed":
        return json.dumps(draw(changed(json.loads(data)))).encode()
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    return (data[:start] + draw(st.binary(max_size=8)) + data[end:]) or b"{"


@given(packets())
def test_bytes(data: bytes):
    TRIED["messages"] += 1
    try:
        message, tensors = decode(data)
    except BadMessageError:
        return
    assert isinstance(message, Message)
    assert isinstance(tensors, list)
    again, _ = decode(encode(message, []))
    assert again == message or "nan" in repr(message).lower()


@pytest.fixture(scope="module")
def ends():
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


MEMORIES = ("as described", "none", "small", "a file", "a pipe", "not sealed", "two")


def memory(kind: str) -> list[int]:
    """Descriptors to send along."""
    if kind == "as described":
        descriptor = tensors_to_send().descriptor
        assert descriptor is not None
        return [descriptor]
    if kind == "a file":
        with tempfile.TemporaryFile() as file:
            file.write(bytes(4096))
            return [os.dup(file.fileno())]
    if kind == "a pipe":
        read, write = os.pipe()
        os.close(write)
        return [read]
    if kind == "none":
        return []
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 16 if kind == "small" else 4096)
    return [descriptor, os.dup(descriptor)] if kind == "two" else [descriptor]


@given(changed(SPECS) | st.just(SPECS), st.sampled_from(MEMORIES), st.sampled_from(EVERY_MESSAGE))
def test_tensors(ends, specs, kind: str, message: Message):
    TRIED["messages with tensors"] += 1
    before = len(os.listdir("/proc/self/fd"))
    descriptors = memory(kind)
    data = json.dumps(json.loads(encode(message, [])) | {"tensors": specs}).encode()
    socket.send_fds(ends[0], [data], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        _, tensors = Channel(ends[1]).receive()
    except BadMessageError:
        pass
    else:
        # Whoever reads them neither dies nor sees more than was sent.
        assert sum(tensor.clone().nbytes for tensor in tensors.values()) <= 4096
        if kind == "as described" and specs == SPECS:
            assert torch.equal(tensors["x"], torch.ones(2, 3))
        del tensors
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_packet_over_the_limit(ends):
    wide = encode(EVERY_MESSAGE[0], []) + b" " * (1 << 17)
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ends[0].send(wide)
    with pytest.raises(BadMessageError, match="over 131072 bytes"):
        Channel(ends[1]).receive()


@given(st.lists(packets() | st.sampled_from([encode(message, []) for message in EVERY_MESSAGE]), max_size=4))
def test_the_client_of_a_broken_rank(packets: list[bytes]):
    """One that sends whatever it likes, in whatever order, and leaves: an error, and the group is not used again."""
    TRIED["conversations of a broken rank"] += 1
    group = WorkerGroup(GroupConfig(Devices("cpu"), 1))
    group.state, group._launcher.logs = "ready", Path("logs")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group._channels[0] = Channel(ours)
    for packet in packets:
        theirs.send(packet)
    theirs.shutdown(socket.SHUT_WR)
    request = Stats(1_000_000, "m1")
    with pytest.raises((ValueError, RequestFailedError, WorkersFailedError)):
        group.call(request, {})
    assert not group.usable
    theirs.close()
    group.close()


def test_a_parcel_that_is_not_sent_leaves_nothing():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="257 tensors"):
        pack({str(index): torch.ones(1) for index in range(257)})
    assert SharedTensors(None, []).close() is None
    assert len(os.listdir("/proc/self/fd")) == before
