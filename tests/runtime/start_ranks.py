"""Starts a group of ranks on the CPU as a client does, says what it found as JSON, and ends: ``start_ranks.py RANKS``.

With ``wait`` it does not end: its ranks are there until it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence

from parallel_backend.planning.devices import Devices
from parallel_backend.runtime.client.fork_server import fork_server_pid
from parallel_backend.runtime.client.launcher import Launcher
from parallel_backend.runtime.client.worker_group import WorkerGroup
from parallel_backend.runtime.errors import WorkersFailedError
from parallel_backend.runtime.group_config import GroupConfig
from parallel_backend.runtime.hosts import torchrun


def reveal(imports: Sequence[str] = ()) -> None:
    """Say what a rank finds when it begins, and what this process has of it."""
    torchrun.WORKER = "tests.runtime.reveal"
    launcher = Launcher(1, Devices("cpu"))
    launcher.start(imports)
    file = launcher.logs / "found-0.json"
    while not file.exists() and launcher.running():
        time.sleep(0.02)
    found = json.loads(file.read_text()) if file.exists() else {"error": launcher.explain(None)}
    launcher.stop(0.1)
    flags = {name: getattr(sys.flags, name) for name in found.get("flags", [])}
    found |= {"client": {"path": sys.path, "flags": flags, "warnings": sys.warnoptions}}
    print(json.dumps(found), flush=True)


def main(ranks: int = 1, wait: bool = False) -> None:
    group = WorkerGroup(GroupConfig(Devices("cpu"), ranks))
    began = time.monotonic()
    try:
        group.start()
    except (ValueError, WorkersFailedError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    launcher = group._launcher
    assert launcher.process is not None
    found = {
        "seconds": time.monotonic() - began,
        "private": str(launcher.private),
        "logs": str(launcher.logs),
        "fork server": fork_server_pid(),
        "agent": launcher.process.pid,
        "ranks": list(group._pids.values()),
    }
    print(json.dumps(found), flush=True)
    while wait:
        time.sleep(3600)
    group.close()


def as_first_process() -> None:
    """As a container's first process, which all orphans come to: say who of them has ended and was not asked after."""
    assert os.getpid() == 1, os.getpid()
    zombies = {}
    for victim in ("fork server", "agent", "rank"):
        group = WorkerGroup(GroupConfig(Devices("cpu"), 2))
        group.start()
        launcher = group._launcher
        assert launcher.process is not None
        pids = {"fork server": fork_server_pid(), "agent": launcher.process.pid, "rank": group._pids[0]}
        everybody = {*pids.values(), *group._pids.values()}
        os.kill(pids[victim] or 0, signal.SIGKILL)
        until = time.monotonic() + 8
        while time.monotonic() < until and (victim != "fork server" or any(map(_is_there, everybody))):
            time.sleep(0.05)
            if victim != "fork server" and not any(map(_is_there, everybody - {pids["fork server"]})):
                break
        zombies[victim] = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _state(pid) == "Z"]
        group.close()
    print(json.dumps(zombies), flush=True)


def _is_there(pid: int) -> bool:
    return _state(pid) != ""


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


if __name__ == "__main__":
    main(int(sys.argv[1]), "wait" in sys.argv)
