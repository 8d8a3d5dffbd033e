"""torchrun with two promises more: it listens at one address (alone on a host: loopback), and it ends with its client.

``python -m parallel_backend.runtime.hosts.agent --private FOLDER
(--loopback-port PORT | --card CARD --listen ADDRESS PORT) -- TORCHRUN-ARGUMENTS``; the client holds the other end of
its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import handler_registry
from torch.distributed.run import main as torchrun

from ..rank.rank_log import end_at_once
from .notice_store import NoticeStore
from .notices import Card
from .rank_forks import RankForks

LOOPBACK = "hybrid-dit-loopback"
"""Name of the rendezvous of a group on this machine alone."""
ADDRESS = "127.0.0.1"
STORE_TIMEOUT = timedelta(minutes=5)


def serve_store(address: str, port: int) -> TCPStore:
    """A store at one address of this machine, which the rendezvous of this process at the same port share.

    torchrun's own let their store listen on every interface of the machine, whatever the endpoint says.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(1024)
    return TCPStore(
        address, listener.getsockname()[1], is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False,
        multi_tenant=True, master_listen_fd=listener.detach(),
    )  # fmt: skip


class LoopbackRendezvous(RendezvousHandler):
    """A group of one host: nobody to wait for, and a store that nobody else can reach."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._port = int(parameters.get("port") or 0)
        self._store: Store | None = None

    def get_backend(self) -> str:
        return LOOPBACK

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            self._store = serve_store(ADDRESS, self._port)
            self._port = self._store.port
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def watch_client(private: Path, farewell: Callable[[], None] = lambda: None) -> None:
    """Have `end_with_client` wait for the end of this process's standard input."""
    client = os.dup(0)  # not inherited by the ranks
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=end_with_client, args=(client, private, farewell), daemon=True).start()


def end_with_client(descriptor: int, private: Path, farewell: Callable[[], None]) -> None:
    """Kill the ranks and end once the client is gone or has given the group up, at whatever stage they are.

    Ranks that are up notice by themselves; those that are starting or stopped cannot. ``farewell`` comes in between.
    """
    while os.read(descriptor, 1):
        pass
    shutil.rmtree(private, ignore_errors=True)
    kill_ranks()
    farewell()
    os._exit(1)


def kill_ranks() -> None:
    """Kill what torchrun has started in this process."""
    for pid in _children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # torchrun starts each rank in a group of its own


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            # The name, in parentheses, may have anything in it.
            state_and_parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # no process, or gone by now
            continue
        if entry.name.isdigit() and int(state_and_parent[1]) == parent:
            found.append(int(entry.name))
    return found


def main(forked: bool = False) -> None:
    """Entry point of the agent.

    Args:
        forked: whether it is a fork of the fork server, and its ranks can be.
    """
    forks = RankForks() if forked else None
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--private", type=Path, required=True, help="the control socket's folder, removed with the client"
    )
    parser.add_argument("--loopback-port", type=int, help="rendezvous on this machine alone, at a port; 0: a free one")
    parser.add_argument("--card", help="of a group over several hosts, of which this is the first one")
    parser.add_argument("--listen", nargs=2, metavar=("ADDRESS", "PORT"), help="where that group's store is")
    parser.add_argument("torchrun", nargs="*", help="torchrun's arguments, after --")
    arguments = parser.parse_args()
    watch_client(arguments.private)
    rendezvous = []
    if arguments.loopback_port is not None:
        handler_registry.register(LOOPBACK, LoopbackRendezvous)
        rendezvous = [f"--rdzv-backend={LOOPBACK}", f"--rdzv-conf=port={arguments.loopback_port}"]
    if arguments.card is not None:
        address, port = arguments.listen
        store = serve_store(address, int(port))  # as long as this variable is there
        NoticeStore.publish(store, Card.from_json(arguments.card))
    sys.excepthook = end_at_once
    if forks is not None:
        forks.use()
    torchrun([*rendezvous, *arguments.torchrun])


if __name__ == "__main__":
    main()
