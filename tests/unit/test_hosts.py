"""Several hosts: what the user writes, how addresses are told apart, and what hosts say of themselves."""

from __future__ import annotations

import ipaddress
import socket
import time

import pytest
import torch
from torch.distributed import TCPStore

from parallel_backend.cli.worker import node_rank
from parallel_backend.config import ParallelismConfig
from parallel_backend.planning.devices import Devices
from parallel_backend.runtime.client import other_hosts
from parallel_backend.runtime.client.launcher import Launcher
from parallel_backend.runtime.client.other_hosts import OtherHosts
from parallel_backend.runtime.group_config import GroupConfig, check_devices
from parallel_backend.runtime.host_address import ALONE, Hosts
from parallel_backend.runtime.hosts import notice_store
from parallel_backend.runtime.hosts.joining import Offer, check
from parallel_backend.runtime.hosts.network import (
    interface_to,
    interface_variables,
    local_address,
    own_address,
    resolve,
)
from parallel_backend.runtime.hosts.notice_store import NoticeStore, connect, read_card
from parallel_backend.runtime.hosts.notices import MAX_TEXT, Card, HostNotice, versions
from parallel_backend.runtime.rank.relay import _pack, _unpack
from parallel_backend.runtime.wire.messages import Failed, Keep, Progress

TWO = Hosts(2, "10.0.0.1:29500")
CARD = Card("abc", 2, 4, "cpu", versions())


class TestHosts:
    def test_endpoint(self):
        assert (Hosts(2, " node-0.cluster:29500 ").address, TWO.port) == ("node-0.cluster", 29500)
        assert (Hosts(3, "[fd00::1]:1").address, Hosts(3, "[fd00::1]:1").port) == ("fd00::1", 1)

    @pytest.mark.parametrize(
        "endpoint", ["host", ":29500", "host:", "host:0", "host:65536", "fd00::1:80", "host:²", "a:-1"]
    )
    def test_endpoint_that_cannot_be_read(self, endpoint):
        with pytest.raises(ValueError, match=r"cannot read the rdzv_endpoint .* write ADDRESS:PORT, such as"):
            Hosts(2, endpoint)

    def test_count_and_endpoint_belong_together(self):
        with pytest.raises(ValueError, match="3 hosts need an rdzv_endpoint"):
            Hosts(3)
        with pytest.raises(ValueError, match="of no use to 1 host; set nnodes"):
            Hosts(1, "10.0.0.1:29500")
        for count in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match="nnodes"):
                Hosts(count)

    def test_ranks_are_shared_out_evenly(self):
        assert [list(TWO.ranks_of(host, 4)) for host in (0, 1)] == [[0, 1], [2, 3]]
        assert ALONE.ranks_of(0, 3) == range(3)
        with pytest.raises(ValueError, match=r"3 rank\(s\) cannot be shared out evenly among 2 hosts"):
            TWO.ranks_each(3)

    def test_devices_are_those_of_one_host(self):
        assert check_devices("cpu", ParallelismConfig(2), TWO) == Devices("cpu")
        with pytest.raises(ValueError, match="of 2 ranks, each of 2 hosts has 1"):
            check_devices("0,1", ParallelismConfig(2), TWO)

    def test_groups_in_each_others_way(self):
        cpu = Devices("cpu")
        assert GroupConfig(cpu, 2, TWO).conflicts(GroupConfig(cpu, 4, TWO))
        assert not GroupConfig(cpu, 2, TWO).conflicts(GroupConfig(cpu, 2, Hosts(2, "10.0.0.1:29501")))
        assert not GroupConfig(cpu, 2).conflicts(GroupConfig(cpu, 4))

    def test_which_host_a_worker_is(self):
        assert node_rank(TWO, None) == 1
        three = Hosts(3, "10.0.0.1:29500")
        assert node_rank(three, 2) == 2
        for hosts, given, words in (
            (three, None, "give it --node-rank"),
            (TWO, 0, "the host with ComfyUI is 0"),
            (TWO, 2, "not one of 1 to 1"),
            (ALONE, None, "for 2 and more"),
        ):
            with pytest.raises(ValueError, match=words):
                node_rank(hosts, given)


class TestNetwork:
    def test_loopback(self, monkeypatch):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.delenv(name, raising=False)
        assert resolve("127.0.0.1") == local_address("127.0.0.1") == "127.0.0.1"
        assert interface_to("127.0.0.1") == "lo"
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
        assert interface_variables("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo"}

    def test_interface_of_an_address(self):
        """As the kernel has it in /proc, for the interface that leads to the world, if any does."""
        try:
            local = local_address("192.0.2.200")
        except ValueError:
            pytest.skip("this machine has no route to other networks")
        if ipaddress.ip_address(local).is_loopback:
            pytest.skip("this machine's only interface is the loopback")
        name = interface_to("192.0.2.200")
        assert name in [name for _, name in socket.if_nameindex()]
        assert interface_to(local) == name

    def test_own_address(self, monkeypatch):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(
                ValueError, match=f"cannot listen at the rdzv_endpoint 127.0.0.1:{port} .Address already"
            ):
                own_address(Hosts(2, f"127.0.0.1:{port}"))
        assert own_address(Hosts(2, f"localhost:{port}")) == "127.0.0.1"
        with pytest.raises(ValueError, match="it has to be an address of the host with ComfyUI"):
            own_address(Hosts(2, "192.0.2.1:29500"))
        # As Debian has it in /etc/hosts.
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(socket.AF_INET, 1, 0, "", ("127.0.1.1", 0))])
        with pytest.raises(ValueError, match=r"the name 'me' means 127\.0\.1\.1, where other hosts cannot reach it"):
            own_address(Hosts(2, "me:29500"))


class TestJoining:
    def test_fits(self):
        assert check(CARD, Offer(TWO, 1, "me")) == Devices("cpu")
        assert check(CARD, Offer(TWO, 1, "me", "cpu", 2)) == Devices("cpu")

    @pytest.mark.parametrize(
        ("card", "offer", "words"),
        [
            (CARD, Offer(Hosts(3, TWO.endpoint), 1, "me"), "the group has 2 hosts, but --nnodes is 3 here"),
            (
                CARD,
                Offer(TWO, 1, "me", ranks=4),
                r"2 on each of 2 hosts, but --nproc-per-node is 4 here; .* product is 8",
            ),
            (
                Card("abc", 2, 4, "cpu", {**versions(), "torch": "1.0"}),
                Offer(TWO, 1, "me"),
                f"different software: torch {torch.__version__.replace('+', '.')} here and 1.0 there".replace("+", "."),
            ),
            (
                Card("abc", 2, 4, "cuda", versions()),
                Offer(TWO, 1, "me", "cpu"),
                "runs on GPUs, but this host would on the CPU",
            ),
        ],
    )
    def test_does_not_fit(self, card, offer, words):
        with pytest.raises(ValueError, match=words):
            check(card, offer)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class TestBoard:
    def test_notices(self, store):
        notices = NoticeStore.publish(store, CARD)
        other = connect("127.0.0.1", store.port)
        assert read_card(other) == CARD
        mine = NoticeStore(other, CARD)
        notice = HostNotice("joined", "me", "a", "10.0.0.2")
        assert mine.claim(1, notice) == notice
        assert mine.claim(1, HostNotice("joined", "somebody else")) == notice
        failed, progress = Failed(7, 3, "no", False), Progress(2, 5, 9)
        mine.beat(1, 3)
        mine.forward(failed)
        mine.forward(progress)
        view = notices.read()
        assert (view.hosts, view.beats, view.failed, view.progress) == ({1: notice}, {1: "3"}, [failed], [progress])
        mine.tell(1, HostNotice("died", text="x" * (MAX_TEXT + 50) + "end"))
        assert notices.read().hosts[1].text == ("x" * MAX_TEXT + "end")[-MAX_TEXT:]

    def test_another_groups_board_is_another(self, store, monkeypatch):
        NoticeStore.publish(store, CARD)
        monkeypatch.setattr(notice_store, "STORE_SECONDS", 0.2)
        another = NoticeStore(connect("127.0.0.1", store.port), Card("another", 2, 4, "cpu", {}))
        with pytest.raises(RuntimeError, match="timeout"):
            another.read()

    def test_nobody_there(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            with pytest.raises(OSError, match="refused"):
                connect("127.0.0.1", taken.getsockname()[1])

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"state": 1}', '{"state": "up", "more": 1}', "\xff", '{"ranks_up": -1}']
    )
    def test_what_is_no_notice(self, text):
        if text == "{}":
            assert HostNotice.from_json(text) == HostNotice()
        else:
            with pytest.raises(ValueError, match="not a HostNotice of this version"):
                HostNotice.from_json(text)
        with pytest.raises(ValueError, match="not a Card of this version"):
            Card.from_json(text)


class TestOtherHosts:
    """Against a real store; beats every 0.1 s and a host that is lost after 1 s."""

    @pytest.fixture
    def notices(self, store) -> NoticeStore:
        return NoticeStore.publish(store, CARD)

    @pytest.fixture
    def others(self, store, notices, monkeypatch):
        for name, seconds in (("POLL", 0.02), ("LOST", 1.0), ("DOUBT", 0.4), ("VERDICT", 0.6), ("JOIN", 60.0)):
            monkeypatch.setattr(other_hosts, f"{name}_SECONDS", seconds)
        others = OtherHosts(Hosts(2, f"127.0.0.1:{store.port}"), CARD)
        others.start("127.0.0.1")
        yield others
        others.close()

    def join(self, notices: NoticeStore, state: str = "up", **fields) -> None:
        notices.tell(1, HostNotice(state, "me", "a", "10.0.0.2", ranks_up=2, logs="/logs", **fields))

    def until(self, condition) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + 5
            time.sleep(0.01)
        return time.monotonic() - began

    def test_one_host_has_no_others(self):
        others = OtherHosts(ALONE, None)
        others.start("")
        assert others.all_up()
        assert others.trouble() is others.verdict(lambda: None) is others.log_of(0) is None
        assert not others.wanted()
        assert not others.broken()

    def test_joining(self, notices, others):
        assert others.wanted().startswith("waiting for host 1: run there: python -m parallel_backend worker --nnodes 2")
        self.join(notices)
        self.until(others.all_up)
        assert (others.wanted(), others.ranks_up()) == ("", 2)
        assert others.log_of(3) == "/logs/rank-3.log on a"
        assert others.log_of(1) is None

    def test_beats(self, notices, others):
        self.join(notices)
        for count in range(15):
            notices.beat(1, count)
            time.sleep(0.1)
            assert others.trouble() is None
        assert self.until(others.in_doubt) < 1.0
        assert others.verdict(lambda: None) == "host 1 (a, 10.0.0.2; ranks 2 to 3) has not been heard of for 1 s"
        assert others.broken()

    def test_cancel_while_in_doubt(self, notices, others):
        def cancel() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            others.verdict(cancel)

    def test_death(self, notices, others):
        self.join(notices, "died", text="rank 2 ended")
        self.until(others.trouble)
        assert others.trouble() == "host 1 (a, 10.0.0.2; ranks 2 to 3): rank 2 ended"

    def test_refusal(self, notices, others):
        self.join(notices, "refused", text="--nproc-per-node is 2 here")
        self.until(others.trouble)
        assert others.trouble() == "host 1 (a, 10.0.0.2; ranks 2 to 3) cannot take part: --nproc-per-node is 2 here"

    def test_host_that_left_is_not_the_cause_at_first(self, notices, others):
        self.join(notices, "left", text="they have lost the others")
        self.until(others.broken)
        assert others.trouble() is None
        assert self.until(others.trouble) < 1.0
        assert others.trouble().endswith("they have lost the others")

    def test_news_come_once(self, notices, others):
        messages = [Failed(7, 3, "no", False), Progress(2, 5, 9)]
        for message in messages:
            notices.forward(message)
        seen: list = []
        self.until(lambda: seen.extend(others.news()) or len(seen) == 2)
        time.sleep(0.1)
        assert others.news() == []
        assert seen == messages

    def test_no_doubt_without_a_notices(self, store, notices, others):
        """The group's own process is gone, and whatever is to be said is said by that."""
        self.join(notices)
        self.until(others.all_up)
        others.close()
        began = time.monotonic()
        assert others.verdict(lambda: None) is None
        assert time.monotonic() - began < 1.0


def test_relayed_tensors():
    tensors = {
        "x": torch.randn(2, 3, 5),
        "ids": torch.arange(7),
        "half": torch.randn(3).bfloat16(),
        "mask": torch.ones(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "number": torch.tensor(3.5),
        "strided": torch.randn(4, 6).T,
    }
    message, received = _unpack(_pack(Keep(3, "m", ["old"]), tensors).clone())
    assert message == Keep(3, "m", ["old"])
    assert list(received) == list(tensors)
    for name, tensor in tensors.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)
    message, received = _unpack(_pack(Keep(4, "m"), {}))
    assert (message, received) == (Keep(4, "m"), {})


@pytest.mark.parametrize("hosts", [ALONE, Hosts(2, "localhost:29517")], ids=["one host", "two hosts"])
def test_ranks_ask_no_name_server(hosts):
    """The first host's name is looked up once; what ranks connect to are numbers."""
    arguments, environment = Launcher(1, Devices("cpu"), hosts=hosts)._rendezvous()
    assert environment["RES_OPTIONS"] == "attempts:0"
    assert not any("localhost" in argument for argument in arguments)
