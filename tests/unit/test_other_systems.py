"""Windows and macOS: whatever ComfyUI imports of the pack can be imported, and says what it needs when it is used."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_backend.config import ParallelismConfig
from parallel_backend.runtime.group_config import ModelConfig

ROOT = Path(__file__).parents[2]
MISSING = {
    # What Python has on Linux and the pack may come across, and does not have there.
    "win32": {
        "os": "memfd_create fork register_at_fork sched_getaffinity sched_setaffinity getuid geteuid getpgid getsid "
        "killpg setsid setpgid waitid P_PID WEXITED WNOWAIT WNOHANG eventfd pidfd_open posix_fadvise preadv pread "
        "sysconf uname ctermid SCHED_OTHER O_DIRECT MFD_CLOEXEC MFD_ALLOW_SEALING",
        "socket": "AF_UNIX send_fds recv_fds SO_PEERCRED SCM_RIGHTS SOCK_SEQPACKET MSG_NOSIGNAL MSG_DONTWAIT "
        "MSG_CMSG_CLOEXEC CMSG_SPACE CMSG_LEN",
        "select": "poll POLLIN POLLRDHUP POLLHUP epoll",
        "signal": "SIGKILL SIGCHLD SIGUSR1 SIGALRM SIGSTOP SIGCONT SIGHUP setitimer ITIMER_REAL pthread_sigmask "
        "SIG_BLOCK SIG_UNBLOCK siginterrupt",
    },
    "darwin": {
        "os": "memfd_create sched_getaffinity sched_setaffinity eventfd pidfd_open posix_fadvise O_DIRECT MFD_CLOEXEC "
        "MFD_ALLOW_SEALING",
        "socket": "SO_PEERCRED MSG_CMSG_CLOEXEC MSG_NOSIGNAL SOCK_CLOEXEC",
        "select": "POLLRDHUP epoll",
        "fcntl": "F_SEAL_SHRINK F_SEAL_GROW F_SEAL_SEAL F_ADD_SEALS F_GET_SEALS",
    },
}
NO_MODULES = {"win32": ["fcntl", "resource", "pwd", "grp", "termios", "pty"], "darwin": []}
IMPORTS = """
import importlib, sys, types
import torch, diffusers, transformers, torch.distributed.run  # what is not ours knows its way
import torch.distributed.elastic.rendezvous.registry, torch.utils.flop_counter
system, attributes, modules, wanted = {arguments!r}
for module, names in attributes.items():
    for name in names.split():
        if hasattr(importlib.import_module(module), name):
            delattr(sys.modules[module], name)
for name in modules:
    sys.modules[name] = None
sys.platform = system
for name in wanted:
    importlib.import_module(name)
from parallel_backend.limits import cores, memory
from parallel_backend.planning.devices import resolve_devices
from parallel_backend.planning.auto_layout import choose_for_checkpoint
assert cores() >= 1 and resolve_devices("auto", 2).kind == "cpu"
from parallel_backend.runtime.client.launcher import prepare
prepare(None)
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.config import ParallelismConfig
try:
    ModelConfig.create("none", ParallelismConfig())
except ValueError as error:
    print(error)
"""


def imported_by_the_nodes() -> list[str]:
    """The library's modules that ``nodes`` imports, at once or when it needs them."""
    found = set()
    for file in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("parallel_backend"):
                found.add(node.module)
    return sorted(found)


@pytest.mark.parametrize(
    ("system", "says"),
    [
        ("win32", r"parallel workers need Linux, and this is Windows; run ComfyUI in WSL 2, where they work"),
        pytest.param(
            "darwin",
            r"parallel workers need Linux, and this is macOS; run ComfyUI on a Linux machine",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_it_is_imported_and_says_what_it_needs(system, says):
    modules = imported_by_the_nodes()
    assert len(modules) > 10
    code = IMPORTS.format(arguments=(system, MISSING[system], NO_MODULES[system], modules))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(says, done.stdout), done.stdout


def test_a_linux_without_memfd(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ValueError, match=r"need memfd_create, which this Linux lacks; .*kernel 3\.17"):
        ModelConfig.create(tmp_path, ParallelismConfig())
