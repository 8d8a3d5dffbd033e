"""Messages and tensors between client and rank: what is sent arrives, and nothing is left behind."""

import fcntl
import gc
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from parallel_backend.runtime.wire import messages
from parallel_backend.runtime.wire.channel import MAX_PACKET, Channel, ChannelClosedError, ChannelStuckError, peer
from parallel_backend.runtime.wire.messages import Adapt, Done, EncodeText, Failed, Hello, Keep, Load, Predict, Progress
from parallel_backend.runtime.wire.shared_tensors import Buffer, pack

EVERY_MESSAGE = [
    Hello(rank=3, pid=4711),
    Load(id=1, model="m1", path="/models/Flüx 2", ulysses=2, ring=1, tp=4, dtype="bfloat16"),
    EncodeText(id=2, model="m1"),
    Keep(id=3, model="m1", forget=["t1", "t2"]),
    Adapt(id=3, model="m1", component="transformer", set="of today", forget=["a1"]),
    Predict(
        id=4, model="m1", context="t5", references=["t6", "t7"], cache={"settings": {}, "evaluation": {"position": 0.5}}
    ),
    messages.EndRun(id=5, model="m1", run="ab12"),
    messages.DecodeLatent(id=5, model="m1"),
    messages.EncodeImage(id=6, model="m1"),
    messages.Stats(id=7, model="m1"),
    messages.Offload(id=8, model="m1", component="transformer"),
    messages.Lend(id=8, size=3 * 2**30, ranks=[0]),
    messages.Unload(id=9, model="m1"),
    messages.Notice("what users should know"),
    Progress(rank=1, done=2**40, total=2**41),
    Done(id=8, rank=0, seconds=0.25, data={"weight_bytes": {"vae": 12}, "device": "cpu"}),
    Failed(id=9, rank=2, error="no", bad_input=True, traceback="Traceback ...\n"),
]


@pytest.fixture
def ends():
    """Both ends of a connection."""
    pair = [Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    yield pair
    for channel in pair:
        channel.close()


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_every_message_type_is_in_this_file():
    assert {type(message) for message in EVERY_MESSAGE} == set(messages.Message.__args__)


@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(ends, message):
    ends[0].send(message)
    assert ends[1].receive() == (message, {})


@pytest.mark.parametrize(
    "data",
    [
        b'{"type": "Reboot", "fields": {}, "tensors": []}',
        b'{"type": "Hello", "fields": {"rank": 0}, "tensors": []}',
        b'{"type": "Hello", "fields": {"rank": 0, "pid": 1, "host": "a"}, "tensors": []}',
        b'{"fields": {}}',
        b"[]",
        b"\xff\xfe",
    ],
)
def test_what_is_no_message_is_refused_and_shown(ends, data):
    ends[0].socket.send(data)
    with pytest.raises(ValueError, match="not a message of this version") as caught:
        ends[1].receive()
    assert repr(data)[2:20] in str(caught.value)


def test_messages_keep_their_order(ends):
    for number in range(20):
        ends[0].send(EncodeText(number, "m1"))
    assert [ends[1].receive()[0].id for _ in range(20)] == list(range(20))


@pytest.mark.parametrize("character", ["x", "\n", "é", "\U0001f600"], ids=["ascii", "newline", "latin", "emoji"])
def test_a_traceback_of_any_length_fits_and_keeps_its_end(ends, character):
    text = character * 100_000 + "the cause"
    ends[0].send(Failed(1, 0, text, False, text))
    message, _ = ends[1].receive()
    assert message.error.endswith("the cause")
    assert message.traceback.endswith(character + "the cause")


def test_a_message_over_the_limit_is_refused_before_it_is_sent(ends):
    with pytest.raises(ValueError, match=rf"a Done of \d+ bytes is over the limit of {MAX_PACKET}"):
        ends[0].send(Done(1, 0, 0.0, {"much": ["x" * 1000] * 200}))
    ends[0].send(EncodeText(2, "m1"))
    assert ends[1].receive()[0] == EncodeText(2, "m1")


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_arrives_bit_for_bit(ends, dtype):
    sent = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)).to(dtype) / 3
    sent = sent.to(dtype)
    ends[0].send_tensors(EncodeText(1, "m1"), {"x": sent})
    _, received = ends[1].receive()
    assert received["x"].dtype == dtype
    assert torch.equal(received["x"], sent)


def test_values_that_are_no_numbers_survive(ends):
    sent = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=torch.bfloat16)
    ends[0].send_tensors(EncodeText(1, "m1"), {"x": sent})
    received = ends[1].receive()[1]["x"]
    assert torch.equal(received.view(torch.int16), sent.view(torch.int16))


def test_several_tensors_of_odd_sizes_in_one_parcel(ends):
    sent = {
        "scalar": torch.tensor(2.5),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "empty": torch.empty(2, 0, 4, dtype=torch.float16),
        "double": torch.randn(5, dtype=torch.float64),
        "long": torch.arange(130),
    }
    ends[0].send_tensors(EncodeText(1, "m1"), sent)
    _, received = ends[1].receive()
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert received[name].shape == tensor.shape
        assert torch.equal(received[name], tensor)


def test_nothing_but_empty_tensors(ends):
    ends[0].send_tensors(EncodeText(1, "m1"), {"x": torch.empty(0, 3), "y": torch.empty(4, 0, dtype=torch.int64)})
    _, received = ends[1].receive()
    assert received["x"].shape == (0, 3)
    assert received["y"].shape == (4, 0)
    assert received["y"].dtype == torch.int64


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1:2].expand(4, -1),
        lambda x: x.flip(0),
        lambda x: x.requires_grad_(),
        lambda x: torch._neg_view(x),
    ],
    ids=["transposed", "strided", "expanded", "flipped", "with gradient", "negative by its name alone"],
)
def test_tensors_that_are_not_plain_memory(ends, change):
    sent = change(torch.randn(6, 8))
    ends[0].send_tensors(EncodeText(1, "m1"), {"x": sent})
    assert torch.equal(ends[1].receive()[1]["x"], sent)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_is_not_sent_is_named(dtype):
    with pytest.raises(ValueError, match=r"tensor mask has dtype .*, which is not sent; one of .* is") as caught:
        pack({"mask": torch.zeros(2, dtype=dtype)})
    assert str(dtype).removeprefix("torch.") in str(caught.value)


def test_a_receiver_has_a_tensor_of_its_own(ends):
    other = [Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    sent = torch.randn(2000)
    shared = pack({"x": sent})
    for channel in (ends[0], other[0]):
        channel.send(EncodeText(1, "m1"), shared)
    first = ends[1].receive()[1]["x"]
    first.zero_()
    second = other[1].receive()[1]["x"]  # mapped after the write
    assert torch.equal(second, sent)
    second.fill_(7)
    ends[0].send(EncodeText(2, "m1"), shared)
    third = ends[1].receive()[1]["x"]
    shared.close()
    assert torch.equal(third, sent)
    assert not first.any()
    for channel in other:
        channel.close()


def test_a_buffer_is_used_again_and_grows(ends):
    buffer = Buffer()
    inodes = []
    for size in (2000, 1000, 5000):
        sent = torch.randn(size)
        ends[0].send_tensors(EncodeText(1, "m1"), {"x": sent}, buffer)
        assert torch.equal(ends[1].receive()[1]["x"], sent)
        assert buffer.descriptor is not None
        inodes.append(os.fstat(buffer.descriptor).st_ino)
    assert inodes[0] == inodes[1] != inodes[2]
    buffer.close()
    assert buffer.descriptor is None


def test_a_tensor_outlives_its_parcel_and_its_channel():
    ours, theirs = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    sent = torch.randn(3000)
    ours.send_tensors(EncodeText(1, "m1"), {"x": sent})
    received = theirs.receive()[1]["x"]
    ours.close()
    theirs.close()
    gc.collect()
    assert torch.equal(received, sent)


def test_no_descriptor_is_left_after_200_round_trips(ends):
    before = open_descriptors()
    for number in range(200):
        ends[0].send_tensors(EncodeText(number, "m1"), {"x": torch.ones(1000)})
        message, tensors = ends[1].receive()
        ends[1].send_tensors(Done(message.id, 0, 0.0), {"y": tensors["x"] + 1})
        ends[0].receive()
        del tensors
    assert open_descriptors() == before


def test_refused_messages_leave_no_descriptor(ends):
    before = open_descriptors()
    for _ in range(20):
        shared = pack({"x": torch.ones(10)})
        socket.send_fds(ends[0].socket, [b'{"type": "Reboot"}'], [shared.descriptor])
        shared.close()
        with pytest.raises(ValueError, match="not a message"):
            ends[1].receive()
        with pytest.raises(ValueError, match="not sent"):
            pack({"good": torch.ones(3), "bad": torch.ones(3, dtype=torch.bool)})
    assert open_descriptors() == before


def test_shared_memory_has_no_name():
    """What has no name cannot be left behind: after the shared is closed, nothing refers to the memory any more."""
    shared = pack({"x": torch.ones(10)})
    target = Path(f"/proc/self/fd/{shared.descriptor}").readlink()
    shared.close()
    assert str(target).startswith("/memfd:")
    assert str(target).endswith("(deleted)")


def test_a_closed_peer_is_told(ends):
    ends[1].close()
    with pytest.raises(ChannelClosedError):
        ends[0].send(EncodeText(1, "m1"))
    with pytest.raises(ChannelClosedError):
        ends[0].receive()


def test_what_was_sent_before_the_peer_closed_still_arrives(ends):
    ends[0].send_tensors(EncodeText(1, "m1"), {"x": torch.ones(5)})
    ends[0].close()
    message, tensors = ends[1].receive()
    assert message == EncodeText(1, "m1")
    assert torch.equal(tensors["x"], torch.ones(5))
    with pytest.raises(ChannelClosedError):
        ends[1].receive()


def test_an_end_that_takes_nothing_is_given_up_in_time():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, send_seconds=0.3)
    message = Failed(1, 0, "x" * 5000, False, "x" * 5000)
    sent, stuck = 0, None
    while stuck is None and sent < 10_000:
        began = time.monotonic()
        try:
            channel.send(message)
            sent += 1
        except ChannelStuckError as error:
            stuck = error
    assert "no message for 0.3 s" in str(stuck)
    assert 0.25 <= time.monotonic() - began < 5  # the machine may be busy
    assert sent > 0
    for _ in range(sent):  # all that was sent is there, and the one that was not is not half there
        assert Channel(theirs).receive()[0] == message
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    channel.close()
    theirs.close()


def test_who_is_at_the_other_end(tmp_path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "control"))
    listener.listen()
    connect = "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", connect, str(tmp_path / "control")]) as process:
        connection, _ = listener.accept()
        assert peer(connection) == (process.pid, os.geteuid())
    # As it was when it connected: also now that it is gone.
    assert peer(connection) == (process.pid, os.geteuid())
    connection.close()
    listener.close()


def test_memory_that_was_sent_keeps_its_size():
    shared = pack({"x": torch.ones(5000)})
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(shared.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    shared.close()


def test_a_received_descriptor_does_not_go_to_other_programs(ends, monkeypatch):
    inherited = []
    monkeypatch.setattr(
        "parallel_backend.runtime.wire.channel.unpack",
        lambda descriptor, specs: inherited.append(os.get_inheritable(descriptor)) or os.close(descriptor) or {},
    )
    ends[0].send_tensors(EncodeText(1, "m1"), {"x": torch.ones(3)})
    ends[1].receive()
    assert inherited == [False]
