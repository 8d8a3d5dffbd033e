"""Ranks as forks: torchrun starts and supervises them as ever, but each has everything imported when it begins.

An agent has threads by the time that torchrun starts the ranks, and what is forked then may find a lock held for ever.
So the agent forks, while it has one thread, a process that waits for torchrun's commands, forks a rank for each, and
ends: its orphans become the agent's own children.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from .. import boot
from ..forking import Order, adopt_orphans, end_with_parent, run, start_as, take_name, threads

POLL_SECONDS = 0.02


class RankForks:
    """Forks of this process as it is now. Make it before this process has a second thread."""

    def __init__(self) -> None:
        assert len(threads()) == 1, "a fork may find a lock that another thread held"
        self._agent = os.getpid()
        self._started = 0
        adopt_orphans()
        self._orders, orders = socket.socketpair()
        self._template = os.fork()
        if not self._template:
            self._orders.close()
            _fork_ranks(orders, self._agent)
        orders.close()

    def use(self) -> None:
        """Have torchrun start ranks so, in this process."""
        if hasattr(api, "get_subprocess_handler"):  # else they are started anew, and import for themselves
            api.get_subprocess_handler = functools.partial(_Handler, self)

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> ForkedRank:
        """Fork a rank for a command of `boot.command`."""
        take_name()  # which torchrun has changed
        order = Order(*boot.split(command), dict(environment), title=f"rank {environment['RANK']}")
        order.send(self._orders, [1, 2])
        pid = int(self._orders.recv(32) or b"0")
        if not pid:
            raise RuntimeError("the process that ranks are forked from has ended")
        self._started += 1
        if self._started == int(environment["LOCAL_WORLD_SIZE"]):
            self.close()
        return ForkedRank(pid)

    def close(self) -> None:
        """No further rank is started; those that are become this process's children. Safe to call more than once."""
        if self._template:
            self._orders.close()
            os.waitpid(self._template, 0)
            self._template = 0


def _fork_ranks(orders: socket.socket, agent: int) -> NoReturn:
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)  # what was the client's end of the agent
    while received := Order.receive(orders, 2):
        order, streams = received
        here = os.getpid()
        pid = os.fork()
        if not pid:
            orders.close()
            start_as(order, [os.open(os.devnull, os.O_RDONLY), *streams])
            while os.getppid() == here:
                time.sleep(0.001)
            end_with_parent(agent)
            run(order.module)
        with contextlib.suppress(PermissionError):  # it has made itself a session already
            os.setpgid(pid, pid)  # torchrun may end the group from now on
        for descriptor in streams:
            os.close(descriptor)
        orders.send(str(pid).encode())
    os._exit(0)


class ForkedRank:
    """What torchrun asks of a process that it has started; see `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None where it has not ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return code


class _Handler(SubprocessHandler):
    """torchrun's handle on a rank."""

    def __init__(self, forks: RankForks, **arguments: Any) -> None:
        self._forks = forks
        super().__init__(**arguments)

    def _popen(self, args: Sequence[str], env: Mapping[str, str]) -> Any:
        return self._forks.start(args, env)
