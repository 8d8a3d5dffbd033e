"""One of the other hosts in one group: waits for a group, joins it with torchrun, and looks after the ranks here.

``python -m parallel_backend.runtime.hosts.host --private FOLDER --owner NAME ...``; the command ``worker`` starts it
anew for each group, and holds the other end of its standard input. Threads of it may be stuck in a store that does not
answer any more; it ends all the same.
"""

from __future__ import annotations

import argparse
import os
import selectors
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from ...paths import AGENT_LOG, hold, new_log_folder
from ..forking import take_name
from ..host_address import Hosts
from ..rank.rank_log import log_file, log_to
from ..wire.channel import Channel, ChannelClosedError
from ..wire.handshake import Handshakes
from ..wire.messages import Failed, Progress
from .agent import kill_ranks, watch_client
from .joining import Joined, Offer, Say, in_time, join
from .network import NO_NAME_SERVER, interface_variables
from .notice_store import NoticeStore, connect
from .notices import HostNotice
from .rank_forks import RankForks
from .torchrun import (
    ask_no_name_server,
    describe_end,
    inherited_environment,
    listen,
    static_rendezvous,
    torchrun_arguments,
)

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 8.0
"""After so long without an answer of the store the ranks are killed."""
REPORT_SECONDS = 2.0
"""How long torchrun may take to say how a rank ended, before the others are killed."""


class Beats:
    """Tells the first host every second, in a thread of its own, that this one is alive.

    Args:
        notices: of the group; nobody else uses its connection.
        host: which host this is.
    """

    def __init__(self, notices: NoticeStore, host: int) -> None:
        self._notices, self._host = notices, host
        self._answered = time.monotonic()
        self.gone = False
        """Whether the store has ended the connection, as it does with the group."""
        threading.Thread(target=self._run, name="beats", daemon=True).start()

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                self._notices.beat(self._host, count)
            except RuntimeError as error:
                self.gone = "timeout" not in str(error)
                if self.gone:
                    return
            else:
                self._answered = time.monotonic()
            time.sleep(BEAT_SECONDS)

    @property
    def silent(self) -> bool:
        """Whether the store has not answered for too long."""
        return time.monotonic() - self._answered > SILENCE_SECONDS


class Keeper:
    """Looks after the ranks of this host until the first of them, or the group, ends; then ends this process.

    Args:
        joined: the group.
        offer: what this host is in it.
        private: folder of the ranks' socket.
        logs: folder of their logs.
        say: tells the user something.
    """

    def __init__(self, joined: Joined, offer: Offer, private: Path, logs: Path, say: Say) -> None:
        self.joined, self.offer, self.private, self.logs, self.say = joined, offer, private, logs, say
        self.ranks = offer.hosts.ranks_of(offer.host, joined.card.ranks)
        self.notice = replace(joined.notice, logs=str(logs))
        self.outcome: BaseException | None = None
        self.torchrun_ended = threading.Event()
        self._channels: dict[int, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._handshakes = Handshakes(listen(private, len(self.ranks)), self.ranks)
        self._notices = NoticeStore(connect(joined.address, offer.hosts.port), joined.card)
        self._beats = Beats(NoticeStore(joined.store, joined.card), offer.host)

    def run(self) -> None:
        """Do it; for a thread beside torchrun's."""
        first: int | None = None
        while first is None and not self.torchrun_ended.is_set() and not self._beats.gone and not self._beats.silent:
            if len(self._channels) < len(self.ranks):
                self._receive_ranks()
            first = self._listen()
        self._end(first)

    def say_farewell(self) -> None:
        """Have the first host know that the user has ended this one."""
        self._tell(replace(self.notice, state="died", text="the command 'worker' was ended there"))

    def _receive_ranks(self) -> None:
        for hello, channel in self._handshakes.arrivals(0.05):
            self._channels[hello.rank] = channel
            self._selector.register(channel, selectors.EVENT_READ, hello.rank)
            all_up = len(self._channels) == len(self.ranks)
            self.notice = replace(self.notice, state="up" if all_up else "joined", ranks_up=len(self._channels))
            self._tell(self.notice)
            if all_up:
                self.say("up")
                self._handshakes.close()
                shutil.rmtree(self.private, ignore_errors=True)

    def _listen(self) -> int | None:
        """Pass on what ranks say; the first one that has ended."""
        first = None
        for key, _ in self._selector.select(0.1):
            try:
                message, _ = self._channels[key.data].receive()
            except ChannelClosedError:
                first = int(key.data) if first is None else first
                continue  # the others may have said why
            if isinstance(message, (Failed, Progress)):
                self._notices.forward(message)
        return first

    def _end(self, first: int | None) -> NoReturn:
        until = time.monotonic() + REPORT_SECONDS
        while not (self.torchrun_ended.is_set() or self._beats.gone or self._beats.silent):
            if time.monotonic() > until:
                kill_ranks()
                self.torchrun_ended.wait(1.0)
                break
            time.sleep(0.05)
        if self._beats.silent:
            text = (
                f"{self.offer.hosts.endpoint} has not answered for {SILENCE_SECONDS:.0f} s; the ranks here were stopped"
            )
        else:
            notice = self._epitaph(first)
            text = notice.text if self._tell(notice) else "the first host has ended the group"
        self.say(text)
        kill_ranks()
        os._exit(0)

    def _epitaph(self, first: int | None) -> HostNotice:
        """What there is to say of the end of the ranks here.

        Args:
            first: the rank that ended first, where it had come so far as to connect.
        """
        failures = self.outcome.failures if isinstance(self.outcome, ChildFailedError) else {}
        if failures and first is None:
            assert isinstance(self.outcome, ChildFailedError)
            first = self.outcome.get_first_failure()[0]
        if first is not None and first in failures:
            log = log_file(self.logs, first)
            who = f"rank {first}"
            text = describe_end(who, failures[first].exitcode, log if log.exists() else self.logs / AGENT_LOG)
            return replace(self.notice, state="died", text=text)
        if first is not None:
            return replace(self.notice, state="left", text="the ranks here have lost the others, and ended")
        text = describe_end(f"torchrun on {self.notice.name}", None, self.logs / AGENT_LOG)
        return replace(self.notice, state="died", text=text)

    def _tell(self, notice: HostNotice) -> bool:
        """Have the first host know how this one is; whether its store has taken it."""
        try:
            in_time(lambda: self._notices.tell(self.offer.host, notice))
        except (OSError, RuntimeError):
            return False
        return True


def main(forked: bool = False) -> None:
    """Entry point; see `agent.main`."""
    take_name()
    ask_no_name_server()
    forks = RankForks() if forked else None
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--private", type=Path, required=True, help="an empty folder for the ranks' socket")
    parser.add_argument("--owner", required=True, help="names the command that offers this host")
    parser.add_argument("--nnodes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--rdzv-endpoint", required=True)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--nproc-per-node", type=int)
    arguments = parser.parse_args()
    keepers: list[Keeper] = []

    def farewell() -> None:
        for keeper in keepers:
            keeper.say_farewell()

    watch_client(arguments.private, farewell)
    terminal = os.fdopen(os.dup(1), "w")

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=terminal, flush=True)

    hosts = Hosts(arguments.nnodes, arguments.rdzv_endpoint)
    offer = Offer(hosts, arguments.node_rank, arguments.owner, arguments.devices, arguments.nproc_per_node)
    joined = join(offer, say)
    logs = new_log_folder()
    log_to(logs / AGENT_LOG)
    hold(1)
    ranks = hosts.ranks_of(offer.host, joined.card.ranks)
    where = "the CPU" if joined.devices.kind == "cpu" else f"GPU {', '.join(joined.devices.visible)}"
    which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    say(f"joined a group of {joined.card.ranks} ranks: {which} on {where}; logs in {logs}")
    environment = {**inherited_environment(len(ranks), joined.devices), **interface_variables(joined.address)}
    environment |= NO_NAME_SERVER  # the first host's address is a number by now
    os.environ.clear()
    os.environ.update(environment)
    try:
        keeper = Keeper(joined, offer, arguments.private, logs, say)
    except (OSError, RuntimeError):
        say("the first host has ended the group")
        return
    keepers.append(keeper)
    if forks is not None:
        forks.use()
    watching = threading.Thread(target=keeper.run, name="keeper", daemon=True)
    watching.start()
    try:
        torchrun(
            [
                *static_rendezvous(joined.card, offer.host, joined.address, hosts.port),
                *torchrun_arguments(arguments.private, logs, len(ranks), joined.devices.kind),
            ]
        )
    except BaseException as error:
        keeper.outcome = error
        print(f"torchrun ended: {error!r}", file=sys.stderr, flush=True)
    keeper.torchrun_ended.set()
    watching.join()


if __name__ == "__main__":
    main()
