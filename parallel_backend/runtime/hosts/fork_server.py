"""The fork server of a host: torch, diffusers and what models need are imported in it, once for all ranks.

``python -m parallel_backend.runtime.hosts.fork_server ROOM``; the client (`client.fork_server`) holds the other end of
the socket that is its standard input, and sends what is to be forked from here: the agent of each group, whose ranks
are forks of the agent. It has one thread and never touches a device, so that they can be; where a library does either
when it is imported, they are started anew instead, and import for themselves. ROOM is what forks write their names
over.

It ends with its client, once the agents have, or when nobody has wanted anything of it for a while.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from types import FrameType

from ..forking import Order, adopt_orphans, end_with_parent, has_begun_cuda, run, start_as, threads
from ..rank.rank_log import end_at_once

ALWAYS = ("torch", "parallel_backend.runtime.hosts.agent", "parallel_backend.runtime.rank.worker")
"""What every group needs."""
UNNEEDED = ("peft", "sklearn")
"""What diffusers and transformers import where it is installed, and no rank uses. It takes seconds, and what it imports
in turn may touch the GPU."""
IDLE_SECONDS = 600.0
"""It ends after so long without a group."""
END_SECONDS = 5.0
"""How long agents may take to end after the client; then the kernel kills them with this process."""
CHECK_SECONDS = 0.25
STREAMS = 3


class ForkServer:
    """The agents that were forked, and the socket that orders come from."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.agents: dict[int, socket.socket] = {}
        self.safe = True
        self._used = time.monotonic()

    def serve(self) -> None:
        """Carry out orders until the client is gone, or for `IDLE_SECONDS` none has come."""
        while True:
            ready, _, _ = select.select([self.control], [], [], IDLE_SECONDS / 10)
            if ready:
                received = Order.receive(self.control, STREAMS)
                if received is None:
                    return
                self._carry_out(*received)
            if self.agents or ready:
                self._used = time.monotonic()
            elif time.monotonic() - self._used > IDLE_SECONDS:
                return

    def _carry_out(self, order: Order, streams: list[int]) -> None:
        for number in (1, 2):
            os.dup2(streams[number], number)
        with gone_with(self.control), no_ends():
            import_all(order.imports)
        if not order.module or is_gone(streams[0], select.POLLRDHUP):  # given up meanwhile
            for descriptor in streams:
                os.close(descriptor)
            return
        if why_not := cannot_fork():
            self.safe = False
            os.write(streams[1], f"{why_not} once libraries are imported: the ranks import for themselves\n".encode())
        gc.collect()
        gc.freeze()  # what is never looked at again stays shared
        parent = os.getpid()
        with no_ends():
            pid = os.fork()
            if pid:
                self.agents[pid] = socket.socket(fileno=os.dup(streams[0]))
                self._tell(pid, f"pid {pid}\n")
        if not pid:
            self._become(order, streams, parent)
        for descriptor in streams:
            os.close(descriptor)

    def _become(self, order: Order, streams: list[int], parent: int) -> None:
        """Be an agent, in a fork."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with_parent(parent)
        self.control.close()
        for other in self.agents.values():
            other.close()
        start_as(order, streams)
        if self.safe and not in_bad_fork():
            run(order.module)
        command = [sys.executable, "-m", order.module, *order.arguments]
        os.execve(command[0], command, dict(order.environment))

    def reap(self, *_: object) -> None:
        """Ask after agents that have ended, and tell the client how."""
        with contextlib.suppress(ChildProcessError):  # there are none
            while pid := (end := os.waitpid(-1, os.WNOHANG))[0]:
                self._tell(pid, f"exit {os.waitstatus_to_exitcode(end[1])}\n")
                if pid in self.agents:  # else a rank that outlived its agent
                    self.agents.pop(pid).close()

    def _tell(self, pid: int, text: str) -> None:
        agent = self.agents.get(pid)
        if agent is not None:
            with contextlib.suppress(OSError):
                agent.send(text.encode(), socket.MSG_NOSIGNAL)

    def wait_for_agents(self) -> None:
        """Let the agents end. Where the client is gone, rather than done with groups, they notice by themselves."""
        until = float("inf")
        while self.agents and time.monotonic() < until:
            if until == float("inf") and is_gone(self.control):
                until = time.monotonic() + END_SECONDS
            time.sleep(0.02 if until < float("inf") else CHECK_SECONDS)


@contextlib.contextmanager
def no_ends() -> Iterator[None]:
    """The end of a child is told of afterwards: meanwhile the table of agents changes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def is_gone(control: socket.socket | int, event: int = 0) -> bool:
    """Whether the other end is, rather than that it has no more to say; with POLLRDHUP either."""
    poll = select.poll()
    poll.register(control, event)
    return bool(poll.poll(0))


@contextlib.contextmanager
def gone_with(control: socket.socket) -> Iterator[None]:
    """End this process at once if the client goes meanwhile: imports take seconds, and have no other thread."""

    def check(number: int, frame: FrameType | None) -> None:
        if is_gone(control):
            os._exit(1)

    signal.signal(signal.SIGALRM, check)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS, CHECK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def in_bad_fork() -> bool:
    """Whether torch will refuse to use a GPU in this fork, as something has asked CUDA about devices before."""
    found = sys.modules["torch"].cuda._is_in_bad_fork()
    if found:
        print("CUDA was asked about devices while libraries were imported: the ranks import for themselves", flush=True)
    return bool(found)


def import_all(modules: Iterable[str]) -> None:
    """Import modules, until one is in the way of forks. What cannot be imported, its user will say."""
    for module in modules:
        if cannot_fork():
            return
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def cannot_fork() -> str:
    """What is in the way of forking this process; empty where nothing is."""
    if has_begun_cuda():
        return "a GPU is in use"
    others = threads()[1:]
    return f"{len(others)} threads ({', '.join(others)}) are there" if others else ""


def hide(packages: Iterable[str]) -> None:
    """Have packages count as not installed in this process and its forks."""
    for package in packages:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # Python's own way to say so


def main() -> None:
    """Entry point."""
    sys.excepthook = end_at_once
    hide(UNNEEDED)
    gc.disable()  # imports make no garbage to speak of, and looking for it takes a fifth of their time
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    with gone_with(control):
        for module in ALWAYS:
            importlib.import_module(module)
    adopt_orphans()  # ask after ranks, too, whose agent was killed
    fork_server = ForkServer(control)
    signal.signal(signal.SIGCHLD, fork_server.reap)
    fork_server.serve()
    fork_server.wait_for_agents()
    os._exit(0)


if __name__ == "__main__":
    main()
