"""What this process may use of its machine: cores, memory and open files, as far as a container or a job leaves them.

Control groups are looked at with all of their ancestors, in both versions, since each may have a limit of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOST_FILES = 65536
"""Descriptors that a process asks for, where it may have more: some programs look at each possible one."""
_STATISTICS = {
    # Of what a group uses, what it gives back when others need it.
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}
_FILES = {
    # Limits, and what is used.
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    2: (("memory.max", "memory.high"), "memory.current"),
}


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes; None where it cannot be told.

    Args:
        total: of the machine, or what the process may have of it.
        available: that it could get now.
        limit: where `total` comes from a control group, its file.
    """

    total: int | None
    available: int | None
    limit: str = ""


def cores() -> int:
    """Cores that this process may keep busy: of its affinity, its control groups' quotas and its Slurm job the least.

    A part of a core is none: a thread that waits for its share holds up all others.
    """
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or ""
    given = [int(slurm)] if slurm.isdigit() else []
    return max(1, min([here, *given, *map(int, _quotas(Path("/")))]))


def threads_of_a_rank(ranks: int) -> int:
    """Threads that each of so many processes computes with."""
    return max(1, cores() // ranks)


def memory(root: Path = Path("/")) -> Memory:
    """What the machine has, or less where a control group or one of its ancestors has a lower limit.

    Args:
        root: where ``proc`` and the control groups are.
    """
    total, available = _machine_memory(root)
    limit_file = ""
    for version, folder in _groups("memory", root):
        names, used = _FILES[version]
        limits = {name: value for name in names if (value := _number(folder / name)) is not None}
        if not limits:
            continue
        name = min(limits, key=lambda name: limits[name])
        limit = limits[name]
        if total is None or limit < total:
            total, limit_file = limit, str(folder / name)
        usage = _number(folder / used)
        if usage is not None:
            left = max(0, limit - usage + _reclaimable(folder, version))
            available = left if available is None else min(available, left)
    return Memory(total, available, limit_file)


def most_open_files() -> int | None:
    """Files that this process may have open, once it asks for it; None where there is no limit."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def raise_open_files() -> None:
    """Let this process, and those that it starts, open as many files as it is allowed to ask for."""
    import resource  # not on Windows, where the pack still loads

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _machine_memory(root: Path) -> tuple[int | None, int | None]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        values = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
        return values["MemTotal"], values["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (OSError, ValueError, AttributeError):
        return None, None


def _quotas(root: Path) -> Iterator[float]:
    """How many cores each control group may use, where it has a limit."""
    for version, folder in _groups("cpu", root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:  # "max", or -1, is no limit
                yield max(1.0, int(quota) / int(period))


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Version and folder of this process's control groups of a controller, the ancestors' too, as far as they can be
    seen from here."""
    try:
        members = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths: dict[str, str] = {}
    for line in members:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))  # version 2 names none
    for line in mounts:
        place, _, kind = line.partition(" - ")
        filesystem, *_, options = kind.split()
        version = {"cgroup": 1, "cgroup2": 2}.get(filesystem, 0)
        if not version or (version == 1 and controller not in options.split(",")):
            continue
        name = "" if version == 2 else controller
        if name not in paths:
            continue
        shown, mount = (_unescaped(word) for word in place.split()[3:5])
        top = root / mount.lstrip("/")
        folder = top / _below(paths[name], shown)
        while True:
            yield version, folder
            if folder == top:
                break
            folder = folder.parent


def _below(path: str, shown: str) -> str:
    """Where a group is in a mount that shows the groups below one of them; the top where it shows others' only."""
    if ".." in path.split("/"):  # outside of what this process's namespace shows
        return ""
    if shown == "/":
        return path.lstrip("/")
    return path[len(shown) :].lstrip("/") if (path + "/").startswith(shown + "/") else ""


def _unescaped(word: str) -> str:
    for code, letter in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        word = word.replace(code, letter)
    return word


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        return int(file.read_text())
    return None


def _reclaimable(folder: Path, version: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return sum(int(values.get(name, 0)) for name in _STATISTICS[version])
    return 0
