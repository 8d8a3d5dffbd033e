"""The client's side of the fork server (`hosts.fork_server`): started with the first group, there for the next ones."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from ..forking import Order
from ..hosts.network import IFNAME_VARIABLES

OF_A_GROUP = frozenset({"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCHINDUCTOR_CACHE_DIR", *IFNAME_VARIABLES})
"""Variables that differ from group to group, or that torch itself sets in the client. They are read when a rank begins
or compiles; all others may be when it imports."""
_ROOM = " " * 160


class Forked:
    """A process that was forked from the fork server; see `subprocess.Popen`.

    Args:
        connection: the other end of its standard input. The fork server says on it how it goes.
        fork_server: that one.
    """

    def __init__(self, connection: socket.socket, fork_server: subprocess.Popen[bytes]) -> None:
        self._connection, self._fork_server = connection, fork_server
        self._said = b""
        self._pid = 0
        self._asked = time.perf_counter()
        self.import_seconds = 0.0
        """From asking for it to its being there, which it is once everything is imported."""
        self.returncode: int | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Its process id; waits for it to be there. 0 where it never was."""
        while not self._pid and self.returncode is None:
            self._listen(None)
        return self._pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None where it has not ended."""
        self._listen(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else until - time.monotonic()
            if left is not None and left < 0:
                raise subprocess.TimeoutExpired("a fork of the fork server", timeout or 0.0)
            self._listen(left)
        return self.returncode

    def _listen(self, seconds: float | None) -> None:
        """Take in what is said of it, waiting so long for something."""
        if self.returncode is not None:
            return
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if not poll.poll(None if seconds is None else 1000 * seconds):
            return
        with self._lock:
            self._take_in()

    def _take_in(self) -> None:
        try:
            data = self._connection.recv(1024, socket.MSG_DONTWAIT)
        except BlockingIOError:  # another thread was faster
            return
        except ConnectionError:
            data = b""
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            what, _, number = line.decode().partition(" ")
            if what == "pid":
                self._pid = int(number)
                self.import_seconds = time.perf_counter() - self._asked
            else:
                self.returncode = int(number)
        if not data and self.returncode is None:
            # It is killed with the fork server, if it was there.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._fork_server.wait(0.2)
            self.returncode = self._fork_server.returncode or -signal.SIGKILL

    def hang_up(self) -> None:
        """Close its standard input."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Kill it. Where it has not begun, it never will: its standard input is to be closed by now."""
        if self.poll() is None:
            if not self._pid:
                self.returncode = -signal.SIGKILL
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Close this end."""
        self._connection.close()


class ForkServerProcess:
    """One fork server.

    Args:
        environment: of the groups, but for `OF_A_GROUP`.
        output: descriptor for what it prints.
    """

    def __init__(self, environment: Mapping[str, str], output: int) -> None:
        self.environment, self.folder = dict(environment), _folder()
        # Threads of libraries that are only imported would be in the way of forks, and so would a GPU that they look
        # for, which diffusers does: here they see none, and find that out without CUDA. Ranks have no such setting.
        own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        own |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        own |= {name: os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR",) if name in os.environ}
        self._control, control = socket.socketpair()
        with control:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "parallel_backend.runtime.hosts.fork_server", _ROOM],
                env={**self.environment, **own},
                stdin=control.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal is the client's to handle
                umask=0o077,
            )

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether it is there, and what is forked from it has that environment, and this process's folder."""
        return self.process.poll() is None and self.environment == environment and self.folder == _folder()

    def fork(self, order: Order, output: int) -> Forked:
        """Have it carry out an order, as soon as it can.

        Raises:
            OSError: it is gone.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                order.send(self._control, [theirs.fileno(), output, output])
            except OSError:
                ours.close()
                raise
        return Forked(ours, self.process)

    def retire(self) -> None:
        """Let it end once all that was forked from it has."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end: it ends, and what was forked from it does."""
        self._control.close()


_lock = threading.Lock()
_current: ForkServerProcess | None = None
_earlier: list[ForkServerProcess] = []
"""Those that groups may still be there of."""


def fork(order: Order, output: int) -> Forked:
    """Fork from this process's fork server, which is started where there is none of that environment.

    Args:
        order: what is to be forked.
        output: descriptor for what it prints.

    Raises:
        OSError: no process can be started.
    """
    with _lock:
        server = _find(order.environment, output)
        try:
            return server.fork(order, output)
        except OSError:  # it has ended since: nobody had wanted anything of it for a while
            return _find(order.environment, output, anew=True).fork(order, output)


def prepare(environment: Mapping[str, str], imports: Sequence[str]) -> None:
    """Have the fork server of an environment import what a group will need, before there is one."""
    with _lock, open(os.devnull, "r+b") as nothing, contextlib.suppress(OSError):
        _find(environment, nothing.fileno()).fork(Order("", [], {}, imports), nothing.fileno()).close()


def _find(environment: Mapping[str, str], output: int, anew: bool = False) -> ForkServerProcess:
    global _current
    lasting = {key: value for key, value in environment.items() if key not in OF_A_GROUP}
    if _current is None or anew or not _current.suits(lasting):
        if _current is not None:
            _current.retire()
            _earlier.append(_current)
        _current = ForkServerProcess(lasting, output)
    for ended in [earlier for earlier in _earlier if earlier.process.poll() is not None]:
        ended.close()
        _earlier.remove(ended)
    return _current


def fork_server_pid() -> int | None:
    """The process id of this process's fork server, if it is there."""
    return None if _current is None or _current.process.poll() is not None else _current.process.pid


def _folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


def _forget() -> None:
    # A forked child has no fork server, nor the right to keep the parent's alive.
    global _current
    for server in filter(None, (_current, *_earlier)):
        server.close()
    _current = None
    _earlier.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, where the pack still loads and says that it needs Linux
    os.register_at_fork(after_in_child=_forget)
