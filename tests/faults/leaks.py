"""What a server and its workers hold of the machine, counted: processes, descriptors, temporary folders, memory."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.comfyui.processes import group_processes
from tests.comfyui.server import ComfyServer


@dataclass(frozen=True)
class Holdings:
    """Counts at one moment.

    Args:
        processes: of worker groups: ranks and agents.
        memfds, sockets, descriptors: open in the server's process; ``descriptors`` are all, also those two.
        threads: of the server's process.
        temporary: files and folders in the server's folder for temporary files, which is its and its workers' alone.
    """

    processes: int
    memfds: int
    sockets: int
    descriptors: int
    threads: int
    temporary: int

    def more_than(self, other: Holdings, slack: int = 0) -> dict[str, tuple[int, int]]:
        """What there is more of than before, by more than ``slack``: before and now."""
        mine, theirs = asdict(self), asdict(other)
        return {name: (theirs[name], mine[name]) for name in mine if mine[name] > theirs[name] + slack}


def holdings(server: ComfyServer) -> Holdings:
    """Count."""
    assert server.process is not None
    pid = server.process.pid
    links = Counter(_kind(link) for link in _links(pid))
    return Holdings(
        processes=len(group_processes(server)),
        memfds=links["memfd"],
        sockets=links["socket"],
        descriptors=links.total(),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        temporary=len(temporary_files(server)),
    )


def temporary_files(server: ComfyServer) -> set[str]:
    """Names of what is in the server's $TMPDIR."""
    return set(os.listdir(server.environment["TMPDIR"]))


def _links(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(entry))
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


def slope(values: list[float]) -> float:
    """How much values grow from one to the next, by least squares over their second half."""
    half = values[len(values) // 2 :]
    if len(half) < 2:
        return 0.0
    middle, mean = (len(half) - 1) / 2, sum(half) / len(half)
    spread = sum((index - middle) ** 2 for index in range(len(half)))
    return sum((index - middle) * (value - mean) for index, value in enumerate(half)) / spread
