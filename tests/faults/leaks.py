"""What a server and its workers hold of the machine, counted: processes, descriptors, temporary folders, memory."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel_backend.paths import KEPT_LOGS
from tests.comfyui.processes import IMPORTER_MODULE, command_line, environment, worker_ranks
from tests.comfyui.server import ComfyServer

from .injection import FOLDER


@dataclass(frozen=True)
class Holdings:
    """Counts at one moment.

    Args:
        processes: that the server started, and those that these started, wherever they are now: ranks and agents. Not
            the fork server, which stays.
        zombies: children of the server that have ended and that it did not ask after.
        memfds, sockets, descriptors: open in the server's process; ``descriptors`` are all, also those two.
        rank_memfds: open in the ranks, all together.
        threads: of the server's process.
        temporary: files and folders in the server's folder for temporary files, which is its and its workers' alone.
        logs: folders of logs, beyond those that are kept.
    """

    processes: int
    zombies: int
    memfds: int
    rank_memfds: int
    sockets: int
    descriptors: int
    threads: int
    temporary: int
    logs: int

    def more_than(self, other: Holdings, slack: int = 0) -> dict[str, tuple[int, int]]:
        """What there is more of than before, by more than ``slack``: before and now."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (theirs[name], mine[name]) for name in mine if mine[name] > theirs[name] + slack}


def holdings(server: ComfyServer) -> Holdings:
    """Count."""
    assert server.process is not None
    pid = server.process.pid
    links = Counter(_kind(link) for link in _links(pid))
    logs = Path(server.environment["HYBRID_DIT_HOME"]) / "logs"
    return Holdings(
        processes=len(started_by(server)),
        zombies=sum(is_zombie and parent == pid for is_zombie, parent in map(_state, _processes())),
        memfds=links["memfd"],
        rank_memfds=sum(_kind(link) == "memfd" for rank in worker_ranks(server) for link in _links(rank)),
        sockets=links["socket"],
        descriptors=links.total(),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        temporary=len(temporary_files(server)),
        logs=max(0, len(list(logs.glob("*"))) - KEPT_LOGS),
    )


def started_by(server: ComfyServer) -> set[int]:
    """The processes that stem from a server, whatever became of it and of those between, but itself and the importing
    process."""
    mark = (FOLDER, server.environment[FOLDER])
    found = set()
    for pid in _processes():
        with contextlib.suppress(OSError):  # gone, or not ours
            if mark in environment(pid).items() and not _state(pid)[0] and IMPORTER_MODULE not in command_line(pid):
                found.add(pid)
    return found - {server.process.pid if server.process else 0}


def _processes() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _state(pid: int) -> tuple[bool, int]:
    """Whether a process has ended and waits for its parent to ask, and its parent."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False, 0
    return state == "Z", int(parent)


def temporary_files(server: ComfyServer) -> set[str]:
    """Names of what is in the server's $TMPDIR."""
    return set(os.listdir(server.environment["TMPDIR"]))


def _links(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):  # gone
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
    return found


def _kind(link: str) -> str:
    if link.startswith("/memfd:hybrid-dit"):
        return "memfd"
    return "socket" if link.startswith("socket:") else "other"


def resident_kib(pid: int) -> int:
    """Memory that a process has of its own, in KiB; 0 where it is gone. Pages of files are not counted."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


def growth(values: Sequence[float]) -> float:
    """How much values grow from one to the next, whatever comes and goes in between.

    The least of the last third is compared with the least of the first third: what allocators keep for a while only
    adds to what is really held, and the least of several has the least of it.
    """
    third = len(values) // 3
    if not third:
        return 0.0
    first, last = values[:third], values[-third:]
    return (min(last) - min(first)) / (len(values) - third)
