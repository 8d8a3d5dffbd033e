"""What a forked process does to be like one that was started: its streams, environment, name, whom it ends with."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn

NAME = "hybrid-dit"
_LENGTH = struct.Struct("!I")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Order:
    """What a fork is to be: ``python -m module arguments`` in an environment.

    Args:
        module: has a function ``main(forked: bool)``. Without it nothing is forked.
        arguments: its ``sys.argv[1:]``.
        environment: all of it.
        imports: modules to import before the fork, where they can be.
        title: what else its command line says in lists of processes.
    """

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    imports: Sequence[str] = ()
    title: str = ""

    def send(self, connection: socket.socket, descriptors: Sequence[int]) -> None:
        """Send it with the descriptors of the fork's streams.

        Raises:
            OSError: the other end is gone.
        """
        data = json.dumps(asdict(self)).encode(errors="surrogateescape")
        socket.send_fds(connection, [_LENGTH.pack(len(data))], descriptors)
        connection.sendall(data)

    @classmethod
    def receive(cls, connection: socket.socket, count: int) -> tuple[Order, list[int]] | None:
        """The next order and its descriptors, ``count`` of them; None where the other end is gone."""
        try:
            head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, count)
            if len(head) < _LENGTH.size:
                return None
            data, (length,) = bytearray(), _LENGTH.unpack(head)
            while len(data) < length:
                part = connection.recv(min(1 << 16, length - len(data)))  # what follows is the next order's
                if not part:
                    return None
                data += part
        except ConnectionError:
            return None
        return cls(**json.loads(data)), descriptors


def start_as(order: Order, streams: Sequence[int]) -> None:
    """Have this fork look as if it had been started so: a session, streams, environment, arguments and name of its own.

    Args:
        order: what it is to be.
        streams: descriptors of its standard input, output and error; they are closed.
    """
    with contextlib.suppress(PermissionError):  # it leads a group already
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in {*streams} - {0, 1, 2}:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order.environment)
    module = importlib.import_module(order.module)
    sys.argv = [str(module.__file__), *order.arguments]
    sys.orig_argv = [sys.executable, "-m", order.module, *order.arguments]
    set_command_line([sys.executable, "-m", order.module, *([order.title] if order.title else [])])


def run(module: str) -> NoReturn:
    """Run a module's ``main`` in a fork, and end with it, without the end of the process that this is a copy of."""
    code: object = 1
    try:
        gc.enable()
        importlib.import_module(module).main(forked=True)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process once its parent is gone.

    Args:
        parent: who it has to be; where it is another one by now, this process ends.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def take_name() -> None:
    """Give this process, an agent or a rank, the `NAME` that lists show, and that it keeps when it has ended."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(NAME)


def children(parent: int) -> dict[int, str]:
    """Process ids and names of a process's children, those that have ended and nobody has asked after, too."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:  # it may be gone by now
            # The name, in parentheses, may have anything in it.
            start, _, rest = file.read().rpartition(b")")
            if int(rest.split()[1]) == parent:
                found[int(entry)] = start.partition(b"(")[2].decode(errors="replace")
    return found


def ask_after_orphans() -> bool:
    """Let go of agents and ranks that have ended and have come to this process, as they do to a container's first one
    when the fork server is killed; whether any are still running."""
    running = False
    for pid in (pid for pid, name in children(os.getpid()).items() if name == NAME):
        with contextlib.suppress(ChildProcessError):  # somebody else was faster
            running |= os.waitpid(pid, os.WNOHANG)[0] == 0
    return running


def adopt_orphans() -> None:
    """Become the parent of what children of this process leave behind when they end."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def set_command_line(words: Sequence[str]) -> None:
    """Have lists of processes show these words for this one, as far as its own command line was as long."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # 48 and 49 of all, counted from 1
    if end > start > 0:
        text = b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)[: end - start - 1]
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def threads() -> list[str]:
    """The names of this process's threads, the first one's first."""
    names = []
    for thread in sorted(os.listdir("/proc/self/task"), key=int):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/comm") as file:  # it may end meanwhile
            names.append(file.read().strip())
    return names


def has_begun_cuda() -> bool:
    """Whether this process has touched a GPU's driver, which does not survive a fork."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/dev/nvidia"):
                return True
    return False
