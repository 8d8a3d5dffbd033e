"""What the client of a worker group makes of what ranks say, and when: ranks of this process that answer as told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.families import Conditioning
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.runtime.client import remote_model
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.client.worker_group import WorkerGroup
from parallel_backend.runtime.errors import (
    BatchTooLargeError,
    OutOfMemoryError,
    RequestFailedError,
    WorkersFailedError,
)
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.wire.channel import Channel
from parallel_backend.runtime.wire.messages import Done, EncodeText, Failed, Keep, Notice, Predict, Stats

RANKS = 2


class Cancelled(Exception):  # noqa: N818
    """As ComfyUI's InterruptProcessingException: an Exception of its own."""


def cancel() -> None:
    raise Cancelled


class FakeRanks:
    """The other ends of a group's channels. ``requests`` are those of rank 0."""

    def __init__(self, group: WorkerGroup) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(RANKS)]
        group._channels = {rank: Channel(ours) for rank, (ours, _) in enumerate(pairs)}
        self.channels = [Channel(theirs) for _, theirs in pairs]
        self.requests: list = []

    def receive(self) -> object:
        """The next request, which all ranks have got."""
        request, *others = (channel.receive()[0] for channel in self.channels)
        assert others == [request] * (RANKS - 1)
        self.requests.append(request)
        return request

    def answer(self, answer: Callable[[int, int], Done | Failed]) -> object:
        """Answer the next request; ``answer`` gets its id and the rank."""
        request = self.receive()
        for rank, channel in enumerate(self.channels):
            channel.send(answer(request.id, rank))
        return request

    def meanwhile(self, *answers: Callable[[int, int], Done | Failed]) -> threading.Thread:
        """Give answers to the next requests in a thread of its own."""
        thread = threading.Thread(target=lambda: [self.answer(answer) for answer in answers], daemon=True)
        thread.start()
        return thread


def done(request: int, rank: int) -> Done:
    return Done(request, rank, 0.1)


def failed(request: int, rank: int, **fields) -> Failed:
    return Failed(request, rank, "the reason", False, "the traceback", **fields)


def one_failed(request: int, rank: int, **fields) -> Done | Failed:
    """Rank 1 has failed."""
    return failed(request, rank, **fields) if rank == 1 else done(request, rank)


@pytest.fixture
def config(tiny_pipeline) -> ModelConfig:
    return ModelConfig.create(tiny_pipeline, ParallelismConfig(ulysses_size=RANKS), "cpu")


@pytest.fixture
def group(config) -> Iterator[WorkerGroup]:
    group = WorkerGroup(config.group)
    group.state = "ready"
    group._launcher.log_of = lambda rank: f"rank-{rank}.log"
    yield group
    group.close()


@pytest.fixture
def ranks(group) -> FakeRanks:
    return FakeRanks(group)


@pytest.fixture
def model(group, config) -> RemoteModel:
    return RemoteModel(group, config, open_checkpoint(config.path), "m0")


def stats(group: WorkerGroup, **options):
    return group.call(Stats(group.next_id(), "m0"), {}, **options)


def test_memory_of_one_gpu_is_lent_and_remembered_until_it_is_used(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    config = ModelConfig.create(tiny_pipeline, ParallelismConfig(ulysses_size=RANKS), "0,2")
    group = WorkerGroup(config.group)
    ranks = FakeRanks(group)
    group.state = "ready"
    monkeypatch.setattr(group._launcher, "running", lambda: True)
    model = group.models[config] = RemoteModel(group, config, open_checkpoint(config.path), "m0")

    def lent(request: int, rank: int) -> Done:
        # What the other rank says of itself is none of that GPU's.
        found = {"m0": {"transformer": 700 + rank}, "of another loader": {"transformer": 1}}
        return Done(request, rank, 0.1, {"freed": 1000 * rank, "left": 50, "lent": found})

    try:
        thread = ranks.meanwhile(lent)
        assert group.lend(900, "6") == (1000, 50)
        thread.join()
        (request,) = ranks.requests
        assert (request.size, request.ranks) == (900, [1])
        assert model.lent == {"transformer": 701}
        assert group.lend(900, "5") == (0, 0)  # not one of its GPUs
        thread = ranks.meanwhile(done)
        model._use("transformer", EncodeText(group.next_id(), "m0"), {}, lambda: None)
        thread.join()
        assert model.lent == {}
        group.state = "failed"
        assert group.lend(900, "6") == (0, 0)
    finally:
        group.close()


class TestJudging:
    """Nobody counts as hung, or as left behind, by the clock while there is something to read."""

    def test_an_answer_that_arrived_long_ago_stands_behind_a_notice(self, group, ranks):
        with pytest.raises(Cancelled):
            stats(group, check=cancel, limit=0.05)
        for channel in ranks.channels:
            channel.send(Notice("the transformer moved to host memory"))
        ranks.answer(done)
        time.sleep(0.1)  # longer than it may take
        thread = ranks.meanwhile(done)
        assert len(stats(group)[0]) == RANKS
        thread.join()

    def test_the_client_is_stopped_after_it_has_looked(self, group, ranks, monkeypatch):
        stopped: list[bool] = []

        def stop() -> list:
            if not stopped:
                stopped.append(True)
                ranks.answer(done)
                time.sleep(0.3)  # as by SIGSTOP: the answers came, the clock went on
            return []

        monkeypatch.setattr(group._others, "news", stop)
        assert len(stats(group, limit=0.2)[0]) == RANKS

    def test_ranks_that_are_silent_are_told_of(self, group, ranks):
        with pytest.raises(WorkersFailedError, match=r"rank 0, 1 did not answer within 0 s"):
            stats(group, limit=0.1)

    def test_a_rank_that_has_not_answered_when_another_failed(self, group, ranks, monkeypatch):
        monkeypatch.setattr("parallel_backend.runtime.client.ranks.STRAGGLER_SECONDS", 0.1)
        ranks.channels[1].send(failed(1, 1))
        with pytest.raises(WorkersFailedError, match="rank 1 failed: the reason"):
            stats(group)
        assert group.state == "failed"


class TestSomeRanksFail:
    """Where no other rank waits for the one that failed, the group is as good as before."""

    def test_it_failed_alone(self, group, ranks):
        ranks.meanwhile(lambda *of: one_failed(*of, alone=True), done)
        with pytest.raises(RequestFailedError, match="rank 1 failed: the reason"):
            stats(group)
        assert group.state == "ready"
        assert len(stats(group)[0]) == RANKS

    def test_bad_input_that_one_rank_alone_looked_at(self, group, ranks):
        ranks.meanwhile(
            lambda request, rank: Failed(request, rank, "too small", True, alone=True) if rank else done(request, rank)
        )
        with pytest.raises(ValueError, match=r"^too small$"):
            stats(group)
        assert group.state == "ready"

    def test_out_of_memory_alone(self, group, ranks):
        ranks.meanwhile(lambda *of: one_failed(*of, alone=True, out_of_memory=[2**30, 0]))
        with pytest.raises(OutOfMemoryError, match=r"it asked for 1\.00 GiB") as caught:
            stats(group)
        assert caught.value.usable
        assert caught.value.with_advice("buy more").usable

    def test_it_is_waited_for_what_takes_longer(self, group, ranks, monkeypatch):
        monkeypatch.setattr("parallel_backend.runtime.client.ranks.STRAGGLER_SECONDS", 0.05)
        ranks.channels[1].send(failed(1, 1, alone=True))
        threading.Timer(0.3, lambda: ranks.channels[0].send(done(1, 0))).start()
        with pytest.raises(RequestFailedError):
            stats(group)
        assert group.state == "ready"
        assert not group._owed._requests  # both have answered

    def test_the_others_may_be_waiting_for_it(self, group, ranks):
        ranks.meanwhile(one_failed)
        with pytest.raises(WorkersFailedError, match="The workers were stopped"):
            stats(group)
        assert group.state == "failed"


class TestRefused:
    """What is too long to be sent is refused, and nobody owes an answer to it."""

    @pytest.fixture
    def too_long(self, group):
        return EncodeText(group.next_id(), "m0", [[1, 2, 3]] * 20_000)

    def test_nothing_is_owed(self, group, ranks, too_long):
        with pytest.raises(ValueError, match="over the limit"):
            group.call(too_long, {}, limit=0.05)
        time.sleep(0.1)
        thread = ranks.meanwhile(done)
        assert len(stats(group)[0]) == RANKS
        thread.join()

    def test_an_end_within_sending_ends_the_group(self, group, ranks, monkeypatch):
        send = Channel.send

        def interrupted(self, *args):
            if self is group._channels[1]:
                raise KeyboardInterrupt
            send(self, *args)

        monkeypatch.setattr(Channel, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stats(group)
        assert group.state == "failed"  # one rank has the request and the other has not


class TestKeptConditioning:
    """What the client takes ranks to have is what they have."""

    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(remote_model, "KEPT_TENSORS", 2)

    @staticmethod
    def context(value: float, dtype=torch.float32) -> torch.Tensor:
        return torch.full((1, 3, 4), value, dtype=dtype)

    def test_sent_again_after_a_cancel(self, model, ranks):
        with pytest.raises(Cancelled):
            model._name(self.context(1), [], cancel)
        first = ranks.answer(lambda *of: one_failed(*of, alone=True))  # which nobody waits for any more
        ranks.meanwhile(done)
        name = model._name(self.context(1), [], lambda: None)
        again = ranks.requests[-1]
        assert isinstance(again, Keep)
        assert name == f"t{again.id}"
        assert again.forget == [f"t{first.id}"]  # some rank may have that
        assert model._name(self.context(1), [], cancel) == name  # and now all have it

    @pytest.mark.parametrize("refused", [context(3, torch.bool), context(3, torch.complex64)], ids=["bool", "complex"])
    def test_what_had_to_go_for_one_that_was_refused_goes_with_the_next(self, model, ranks, refused):
        ranks.meanwhile(done, done)
        names = [model._name(self.context(value), [], lambda: None) for value in (1, 2)]
        with pytest.raises(ValueError, match="which is not sent"):
            model._name(refused, [], lambda: None)
        ranks.meanwhile(done, done)
        model._name(self.context(4), [], lambda: None)
        assert names[0] in ranks.requests[-1].forget
        model._name(self.context(5), [], lambda: None)
        assert ranks.requests[-1].forget == [names[1]]

    def test_as_many_stay_as_a_step_with_many_regions_uses(self, model, ranks, monkeypatch):
        monkeypatch.setattr(remote_model, "KEPT_TENSORS", 64)
        contexts = [self.context(value) for value in range(30)]
        ranks.meanwhile(*[done] * 30)
        for context in contexts * 2:
            model._name(context, [], lambda: None)
        assert len(ranks.requests) == 30  # none is sent again
        monkeypatch.setattr(remote_model, "KEPT_BYTES", 10 * contexts[0].nbytes)
        ranks.meanwhile(done)
        model._name(self.context(30), [], lambda: None)
        assert len(ranks.requests[-1].forget) == 15  # large ones are fewer

    def test_one_rank_could_not_keep_it(self, model, ranks):
        ranks.meanwhile(lambda *of: one_failed(*of, alone=True, out_of_memory=[0, 0]), done)
        with pytest.raises(OutOfMemoryError):
            model._name(self.context(1), [], lambda: None)
        assert model.group.state == "ready"
        model._name(self.context(1), [], lambda: None)
        assert [type(request) for request in ranks.requests] == [Keep, Keep]


def test_a_batch_that_is_too_large(model, ranks):
    ranks.meanwhile(done, lambda request, rank: Done(request, rank, 0.1, {"too_large": "by far"}))
    x, context = torch.zeros(2, 128, 2, 2), torch.zeros(2, 3, 192)
    with pytest.raises(BatchTooLargeError, match="by far"):
        model.predict(x, torch.ones(2), Conditioning(context), divisible=True)
    assert isinstance(ranks.requests[-1], Predict)
    assert ranks.requests[-1].divisible
    assert not model.seconds["steps"]
