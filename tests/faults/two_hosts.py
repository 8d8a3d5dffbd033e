"""Two network namespaces as hosts: this process is on the first one, and the command ``worker`` runs on the other."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from parallel_backend.runtime.host_address import Hosts

ROOT = Path(__file__).resolve().parents[2]
FIRST, OTHER = "10.213.7.1", "10.213.7.2"
OTHER_NAME = "the-other-host"
HOSTS = Hosts(2, f"{FIRST}:29517")
RANK, KEEPER = "parallel_backend.runtime.rank.worker", "parallel_backend.runtime.hosts.host"
_CLONE_NEWNET = 0x40000000


class NotPermittedError(Exception):
    """This system does not let us make hosts of namespaces."""


class TwoHosts:
    """Two namespaces with a cable between them.

    Raises:
        NotPermittedError: why they cannot be made.
    """

    def __init__(self) -> None:
        self.names = [f"hybrid-dit-{os.getpid()}-{which}" for which in ("first", "other")]
        self.cables = [f"hd{os.getpid()}a", f"hd{os.getpid()}b"]
        if shutil.which("ip") is None:
            raise NotPermittedError("there is no command 'ip' (iproute2)")
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            ends = zip(self.cables, self.names, (FIRST, OTHER), strict=True)
            _run("ip", "link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
            for cable, name, address in ends:
                _run("ip", "link", "set", cable, "netns", name)
                _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", cable)
                _run("ip", "-n", name, "link", "set", cable, "up")
            # What it does not have must not be seen to be there.
            _run("ip", "netns", "exec", self.names[1], "unshare", "--mount", "--uts", "true")
        except subprocess.CalledProcessError as error:
            self.remove()
            raise NotPermittedError(f"{shlex.join(error.cmd)}: {error.stderr.strip()}") from None

    def remove(self) -> None:
        """Take everything away; whoever is still in a namespace loses its network."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    @contextlib.contextmanager
    def on_first(self) -> Iterator[None]:
        """Have this thread, and what it starts, be on the first host."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.names[0]}") as first:
            _enter(first.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def cut(self) -> None:
        """Cut the other host off."""
        _run("ip", "-n", self.names[1], "link", "set", self.cables[1], "down")

    def mend(self) -> None:
        """Undo that."""
        _run("ip", "-n", self.names[1], "link", "set", self.cables[1], "up")

    def processes(self, module: str) -> list[int]:
        """Process ids on the other host that run a module."""
        namespace = os.stat(f"/run/netns/{self.names[1]}").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                here = entry.name.isdigit() and (entry / "ns/net").stat().st_ino == namespace
                # torchrun has the ranks' module among its arguments; the ranks have it right after python -m.
                if here and module in (entry / "cmdline").read_text().split("\0")[1:4]:
                    found.append(int(entry.name))
        return sorted(found)


class Worker:
    """The command ``worker`` on the other host, which has a name of its own, until the end of the context.

    Args:
        hosts: see `TwoHosts`.
        log: file for what it prints.
        home: folder for its logs.
        hidden: folders that are empty there.
        replaced: folder -> the one that is there in its place.
        group: the hosts of the groups that it is for.
        arguments: further ones of the command.
    """

    def __init__(
        self,
        hosts: TwoHosts,
        log: Path,
        home: Path,
        hidden: tuple[Path, ...] = (),
        replaced: dict[Path, Path] | None = None,
        group: Hosts = HOSTS,
        arguments: tuple[str, ...] = (),
    ) -> None:
        command = [sys.executable, "-m", "parallel_backend", "worker", f"--nnodes={group.count}"]
        command.append(f"--rdzv-endpoint={group.endpoint}")
        steps = [
            f"hostname {OTHER_NAME}",
            *(f"mount -t tmpfs none {shlex.quote(str(folder))}" for folder in hidden),
            *(f"mount --bind {shlex.quote(str(new))} {shlex.quote(str(old))}" for old, new in (replaced or {}).items()),
            f"exec {shlex.join([*command, *arguments])}",
        ]
        inside = ["unshare", "--mount", "--uts", "sh", "-c", " && ".join(steps)]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", hosts.names[1], *inside],
                env={**os.environ, "HYBRID_DIT_HOME": str(home), "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(15) == 0, self.said()
        finally:
            self.process.kill()

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float, after: int = 0) -> None:
        """Wait until it prints a text, after so many characters."""
        deadline = time.monotonic() + seconds
        while text not in self.said()[after:]:
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s in\n{self.said()}"
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
