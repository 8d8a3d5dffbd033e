"""Starting and ending the processes of a worker group: torchrun starts the ranks, a private socket waits for them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...loading.checkpoint import Checkpoint, imports_of
from ...paths import AGENT_LOG, hold, new_log_folder, new_private_folder
from ...planning.devices import Devices
from ..forking import Order
from ..host_address import ALONE, Hosts
from ..hosts.network import IFNAME_VARIABLES, NO_NAME_SERVER, interface_variables, loopback, own_address
from ..hosts.notices import Card
from ..hosts.torchrun import (
    client_environment,
    describe_end,
    inherited_environment,
    listen,
    read_log,
    static_rendezvous,
    torchrun_arguments,
)
from ..rank.rank_log import log_file
from . import fork_server
from .fork_server import Forked

_REMEDIES = {
    errno.EMFILE: "ComfyUI has as many files open as it may: raise the limit where it is started (ulimit -n 65536)",
    errno.ENFILE: "the machine has as many files open as it may: raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes, of the user (ulimit -u) or the container (--pids-limit)",
    errno.ENOMEM: "there is no memory left: end other programs, or give the container more",
    errno.ENOSPC: "the disk is full: free space on it, or set HYBRID_DIT_HOME and TMPDIR to folders on another",
}
AGENT = "parallel_backend.runtime.hosts.agent"


class Launcher:
    """This host's processes of one group. ``start`` returns at once; ranks connect to ``listener`` as they come up.

    Args:
        ranks: number of processes on this host.
        devices: what they run on.
        port: TCP port of the rendezvous on this host alone; 0 takes a free one.
        hosts: those of the group; this is the first one.
    """

    def __init__(self, ranks: int, devices: Devices, port: int = 0, hosts: Hosts = ALONE) -> None:
        self.ranks, self.devices, self.port, self.hosts = ranks, devices, port, hosts
        self.card = Card.create(hosts, ranks * hosts.count, devices.kind) if hosts.several else None
        self.process: Forked | None = None
        self.private: Path | None = None
        """Folder of the socket."""
        self.address = ""
        """Of this host, where the others find it."""

    def start(self, imports: Sequence[str] = ()) -> None:
        """Open the socket and start torchrun.

        Args:
            imports: modules that the ranks are going to need, imported once for all.

        Raises:
            ValueError: the port is taken, the endpoint is no address of this host, or this process or its user has no
                right to what is needed, or no more of it.
        """
        try:
            self._start(imports)
        except (OSError, ValueError) as error:
            if self.private is not None:
                shutil.rmtree(self.private, ignore_errors=True)
            if isinstance(error, ValueError):
                raise
            remedy = _REMEDIES.get(error.errno or 0, "see what else runs here")
            raise ValueError(f"the workers cannot be started: {error}; {remedy}") from error

    def _start(self, imports: Sequence[str]) -> None:
        rendezvous, environment = self._rendezvous()
        self.private = new_private_folder()
        self.logs = new_log_folder()
        self.listener = listen(self.private, self.ranks)
        arguments = [
            *("--private", str(self.private)),
            *rendezvous,
            *torchrun_arguments(self.private, self.logs, self.ranks, self.devices.kind),
        ]
        self._agent_log.touch(0o600)
        with self._agent_log.open("wb") as log:
            hold(log.fileno())
            environment = {**inherited_environment(self.ranks, self.devices), **environment}
            self.process = fork_server.fork(Order(AGENT, arguments, environment, imports), log.fileno())

    def _rendezvous(self) -> tuple[list[str], dict[str, str]]:
        """How the ranks find each other: arguments of the agent and the first of torchrun's, and environment."""
        if self.card is None:
            _check_port(self.port)
            # What ranks of one host have to say to each other outside of shared memory stays on it.
            return [f"--loopback-port={self.port}", "--"], dict.fromkeys(IFNAME_VARIABLES, "lo") | NO_NAME_SERVER
        address = self.address = own_address(self.hosts)
        listen_at = ("--card", self.card.to_json(), "--listen", address, str(self.hosts.port))
        rendezvous = [*listen_at, "--", *static_rendezvous(self.card, 0, address, self.hosts.port)]
        return rendezvous, interface_variables(address) | NO_NAME_SERVER

    def all_connected(self) -> None:
        """Take the socket's address away: nobody else is to come, and a client that is killed leaves nothing behind."""
        self.listener.close()
        if self.private is not None:
            shutil.rmtree(self.private, ignore_errors=True)

    def running(self) -> bool:
        """Whether torchrun has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def import_seconds(self) -> float:
        """Seconds of the start that went by until everything was imported."""
        return 0.0 if self.process is None else self.process.import_seconds

    def forget(self) -> None:
        """Close what a forked child has of this, and leave the processes alone."""
        self.listener.close()
        if self.process is not None:
            self.process.close()

    def stop(self, grace: float = 1.5) -> None:
        """End all processes. The ranks end by themselves once their sockets are closed; whatever lingers is killed.

        Args:
            grace: seconds to wait before killing.
        """
        if self.process is None:
            return
        self.all_connected()
        # Where there are other hosts, torchrun waits for theirs, and they for this one's store to go.
        if self.hosts.several or not self._ended_within(grace):
            self.process.hang_up()  # the agent kills the ranks, stopped ones too
            if not self._ended_within(grace):
                self.process.kill()
        self.process.wait()
        self.process.close()

    def _ended_within(self, seconds: float) -> bool:
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return True
        return False

    # --- what can be said of a failure -------------------------------------------------------------------------------

    @property
    def _agent_log(self) -> Path:
        return self.logs / AGENT_LOG

    def log_of(self, rank: int | None) -> Path:
        """The log to look into: a rank's own, or torchrun's where the rank did not come so far."""
        own = None if rank is None else log_file(self.logs, rank)
        return own if own is not None and own.exists() else self._agent_log

    def explain(self, rank: int | None) -> str:
        """Why processes ended, once they have: rank, exit code or signal, and the last lines of its log.

        Args:
            rank: the one whose connection was lost, if any; torchrun knows better which one was first.
        """
        first = self.first_to_fail()
        code = None
        if first:
            rank, code = first
        elif rank is None and self.process is not None:
            code = self.process.poll()
        who = "the worker launcher" if rank is None else f"rank {rank}"
        return describe_end(who, code, self.log_of(rank))

    def first_to_fail(self, seconds: float = 0.0) -> tuple[int, int] | None:
        """The rank of this host that ended first, and its exit code, once torchrun has ended by that."""
        if self.process is None or not self._ended_within(seconds):
            return None
        cause = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", read_log(self._agent_log), re.DOTALL)
        return (int(cause.group(1)), int(cause.group(2))) if cause else None


def prepare(source: Checkpoint) -> None:
    """Begin to import what a model's ranks will need. Nothing of a group is started."""
    if not hasattr(os, "memfd_create"):  # there are no ranks; `ModelConfig.create` says why
        return
    fork_server.prepare(client_environment(), imports_of(source))


def _check_port(port: int) -> None:
    address = loopback()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", error)
            raise ValueError(f"port {port} cannot be used ({reason}); leave the port at 0 to take a free one") from None
