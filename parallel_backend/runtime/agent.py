"""torchrun with two promises more: alone on a host it listens on loopback only, and it ends when its client does.

``python -m parallel_backend.runtime.agent --private FOLDER [--loopback-port PORT] -- TORCHRUN-ARGUMENTS``; the client
holds the other end of its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import threading
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

LOOPBACK = "hybrid-dit-loopback"
"""Name of the rendezvous of a group on this machine alone."""
ADDRESS = "127.0.0.1"
STORE_TIMEOUT = timedelta(minutes=5)


class LoopbackRendezvous(RendezvousHandler):
    """A group of one host: nobody to wait for, and a store that nobody else can reach.

    torchrun's own rendezvous let their store listen on every interface of the machine, whatever the endpoint says.
    """

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
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((ADDRESS, self._port))
            listener.listen(1024)
            self._port = listener.getsockname()[1]
            self._store = TCPStore(
                ADDRESS, self._port, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False,
                multi_tenant=True, master_listen_fd=listener.detach(),
            )  # fmt: skip
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


def end_with_client(descriptor: int, private: Path) -> None:
    """Kill the ranks and end once the client is gone or has given the group up, at whatever stage they are.

    Ranks that are up notice by themselves; those that are starting or stopped cannot.
    """
    while os.read(descriptor, 1):
        pass
    shutil.rmtree(private, ignore_errors=True)
    for pid in _children(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # torchrun starts each rank in a group of its own
    os._exit(1)


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


def main() -> None:
    """Entry point of the agent."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--private", type=Path, required=True, help="the control socket's folder, removed with the client"
    )
    parser.add_argument("--loopback-port", type=int, help="rendezvous on this machine alone, at a port; 0: a free one")
    parser.add_argument("torchrun", nargs="*", help="torchrun's arguments, after --")
    arguments = parser.parse_args()
    client = os.dup(0)  # not inherited by the ranks
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=end_with_client, args=(client, arguments.private), daemon=True).start()
    rendezvous = []
    if arguments.loopback_port is not None:
        handler_registry.register(LOOPBACK, LoopbackRendezvous)
        rendezvous = [f"--rdzv-backend={LOOPBACK}", f"--rdzv-conf=port={arguments.loopback_port}"]
    torchrun([*rendezvous, *arguments.torchrun])


if __name__ == "__main__":
    main()
