"""The worker processes of a server, read from /proc, and waiting for processes to end."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable
from pathlib import Path

from .server import ComfyServer

WORKER_MODULE = "parallel_backend.runtime.rank.worker"
LAUNCHER_MODULE = "parallel_backend.runtime.hosts.agent"
IMPORTER_MODULE = "parallel_backend.runtime.hosts.fork_server"


def worker_ranks(server: ComfyServer) -> dict[int, int]:
    """Process id -> rank of all workers of all groups of a server."""
    lines = {pid: command_line(pid) for pid in group_processes(server)}
    return {pid: int(line[3].removeprefix("rank ")) for pid, line in lines.items() if WORKER_MODULE in line}


def group_processes(server: ComfyServer) -> set[int]:
    """Process ids of all workers and of the torchrun processes above them, but not of the fork server."""
    return _of_modules(server, {WORKER_MODULE, LAUNCHER_MODULE})


def fork_servers(server: ComfyServer) -> set[int]:
    """Process ids of what the groups of a server are forked from."""
    return _of_modules(server, {IMPORTER_MODULE})


def _of_modules(server: ComfyServer, modules: set[str]) -> set[int]:
    assert server.process is not None
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # "pid (name) state ppid ...", where the name may hold blanks and brackets.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    return {
        pid
        for pid in parents
        if server.process.pid in _ancestors(pid, parents) and not modules.isdisjoint(command_line(pid))
    }


def _ancestors(pid: int, parents: dict[int, int]) -> Iterable[int]:
    while pid in parents:
        pid = parents[pid]
        yield pid


def command_line(pid: int) -> list[str]:
    """The words of a process's command line; those of a fork say what it is."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def environment(pid: int) -> dict[str, str]:
    """What a process was started with: a fork, what the fork server was."""
    entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class Watch:
    """Holds on to running processes, so that their end can be waited for and their ids cannot become others'."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._descriptors: dict[int, int] = {}
        for pid in pids:
            # One that is gone already has nothing to wait for.
            with contextlib.suppress(ProcessLookupError):
                self._descriptors[pid] = os.pidfd_open(pid)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._descriptors)

    def wait(self, seconds: float) -> set[int]:
        """Wait until all have ended, at most so long; the ids of those that have not."""
        deadline = time.monotonic() + seconds
        running = dict(self._descriptors)
        for pid, descriptor in self._descriptors.items():
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                del running[pid]
        return set(running)
