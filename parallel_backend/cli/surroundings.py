"""What the doctor checks around ComfyUI: folders, the interpreter, cores and limits, networks, and what hides GPUs."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .. import limits, paths
from ..machine import Machine
from ..paths import HOME_VARIABLE
from ..runtime.hosts.network import loopback

GIB = 2**30
FEW_FILES = 1024
"""A group of eight ranks has some hundred files and sockets open."""
LITTLE_MEMORY = 16
"""GiB that a container needs about, to read and to move the smaller models."""


class Surrounding(NamedTuple):
    """One thing that was checked; see `doctor.Finding`."""

    level: str
    text: str
    remedy: str = ""


def surroundings(machine: Machine) -> list[Surrounding]:
    """Whether groups can start where this process runs, as this user, and what is less there than it looks.

    Folders that are made for a check are removed again.
    """
    return [*_folders(), *_interpreter(), *_limits(), *_network(), *_gpus(machine)]


def _folders() -> list[Surrounding]:
    found = []
    try:
        home = paths.home()
        found.append(_home(home))
        if _open_to_others(home / "logs"):
            text = f"the disk of {home} keeps no modes: other users of this machine may read the logs of groups"
            found.append(Surrounding("warn", text, f"set {HOME_VARIABLE} to a folder on a disk of Linux's own"))
    except ValueError as error:
        found.append(Surrounding("FAIL", str(error), f"set {HOME_VARIABLE} to a folder that you can write to"))
    try:
        private = paths.new_private_folder()
    except ValueError as error:
        return [*found, Surrounding("FAIL", str(error), "set TMPDIR to a folder on a local disk")]
    shutil.rmtree(private)
    try:
        chosen: str | None = tempfile.gettempdir()
    except FileNotFoundError:
        chosen = None
    if chosen is not None and private.parent != Path(chosen):
        text = f"the folder for temporary files, {chosen}, cannot hold sockets; groups use {private.parent}"
        found.append(Surrounding("ok", text))
    return found


def _home(home: Path) -> Surrounding:
    if os.environ.get(HOME_VARIABLE) or home == _default():
        return Surrounding("ok", f"logs of groups go to {home / 'logs'}")
    text = f"{_default() or 'the home of this user'} cannot be used: logs of groups go to {home / 'logs'}"
    return Surrounding("warn", text, f"set {HOME_VARIABLE} to a folder that you can write to, if you want to keep them")


def _default() -> Path | None:
    try:
        return paths.default_home()
    except RuntimeError:
        return None


def _open_to_others(folder: Path) -> bool:
    """Whether a file that is made for its owner alone is others', too."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return bool(stat.S_IMODE(os.stat(file.name).st_mode) & 0o077)


def _interpreter() -> list[Surrounding]:
    if sys.executable and os.access(sys.executable, os.X_OK):
        return []
    text = f"this Python does not know its own program ({sys.executable!r}), which workers are started with"
    return [Surrounding("FAIL", text, "start ComfyUI with a Python of its own, such as that of a venv")]


def _limits() -> list[Surrounding]:
    found = []
    cores, all_cores = limits.cores(), os.cpu_count() or 1
    if cores < all_cores:
        text = f"{cores} of {all_cores} CPU cores are left to ComfyUI by its affinity, container or Slurm job"
        found.append(Surrounding("ok", f"{text}; ranks compute with as many threads together"))
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdigit() and int(threads) > cores:
        text = f"OMP_NUM_THREADS is {threads}, but there are {cores} CPU core(s) for each rank's threads"
        found.append(Surrounding("warn", text, "unset OMP_NUM_THREADS: ranks then share the cores"))
    memory = limits.memory()
    if memory.limit and memory.total is not None:
        text = f"memory is limited to {memory.total / GIB:.1f} GiB ({memory.limit}), and counts as so much"
        remedy = f"give the container or service more, such as {LITTLE_MEMORY} GiB"
        enough = memory.total >= LITTLE_MEMORY * GIB
        found.append(Surrounding("ok", text) if enough else Surrounding("warn", text, remedy))
    hard = limits.most_open_files()
    if hard is not None and hard < FEW_FILES:
        text = f"a process may have {hard} files open, and ranks may need {FEW_FILES}"
        found.append(Surrounding("warn", text, "raise it: ulimit -Hn, LimitNOFILE= of systemd, --ulimit of Docker"))
    return found


def _network() -> list[Surrounding]:
    try:
        loopback()
    except ValueError as error:
        return [Surrounding("FAIL", str(error), "ip link set lo up")]
    return []


def _gpus(machine: Machine) -> list[Surrounding]:
    try:
        from ..planning.visible_gpus import hidden_gpus, of_one_kind
    except (ImportError, OSError):  # without torch, which the doctor says
        return []
    found = []
    hidden = hidden_gpus(len(machine.gpus))
    if hidden:
        text = f"this Python sees {len(machine.gpus)} GPU(s){hidden}"
        found.append(Surrounding("warn", text, "start ComfyUI without CUDA_VISIBLE_DEVICES and --cuda-device"))
    kinds = [(gpu.name, round(gpu.total / GIB)) for gpu in machine.gpus]
    groups = of_one_kind(kinds)
    if len(groups) > 1:
        listed = "; ".join(f"GPU {', '.join(map(str, group))}: {kinds[group[0]][0]}" for group in groups)
        text = f"the GPUs are unlike ({listed}): 'auto' takes those of one kind, since ranks wait for the slowest"
        found.append(Surrounding("ok", f"{text}; name GPUs in 'devices' to choose"))
    return found
