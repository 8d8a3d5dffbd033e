"""Starting and ending the processes of a worker group: torchrun starts the ranks, a private socket waits for them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..paths import home
from .devices import Devices
from .rank_log import log_file

KEPT_LOGS = 10
"""Log folders of earlier groups that are kept."""

# Of the client's environment the workers must not see: allocator settings (cudaMallocAsync runs out of memory under
# NCCL), and the variables of a distributed job that the client itself may be part of.
_DROPPED = re.compile(
    r"PYTORCH_(CUDA_|HIP_)?ALLOC_CONF|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


class Launcher:
    """The processes of one group. ``start`` returns at once; ranks connect to ``listener`` as they come up.

    Args:
        ranks: number of processes.
        devices: what they run on.
        port: TCP port of the rendezvous; 0 takes a free one.
    """

    def __init__(self, ranks: int, devices: Devices, port: int = 0) -> None:
        self.ranks, self.devices, self.port = ranks, devices, port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Open the socket and start torchrun.

        Raises:
            ValueError: the port is taken.
        """
        if self.port:
            _check_port(self.port)
        self.logs = _new_log_folder()
        self.private = _new_private_folder()
        address = self.private / "control"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(address))
        address.chmod(0o600)
        self.listener.listen(self.ranks)
        command = [
            *(sys.executable, "-m", "parallel_backend.runtime.agent", "--private", str(self.private)),
            *(f"--loopback-port={self.port}", "--"),
            *(f"--nproc-per-node={self.ranks}", "--max-restarts=0", "--monitor-interval=0.2"),
            f"--log-dir={self.logs}",
            *("-m", "parallel_backend.runtime.worker", "--socket", str(address), "--device", self.devices.kind),
            *("--log-folder", str(self.logs)),
        ]
        self._agent_log.touch(0o600)
        with self._agent_log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.PIPE,  # never written to: its end tells the agent that the client is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is the client's to handle
                umask=0o077,
            )

    def _environment(self) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if not _DROPPED.fullmatch(key)}
        package_root = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.ranks)))
        env["PYTHONUNBUFFERED"] = "1"
        env["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices.visible)
        # What ranks of one host have to say to each other outside of shared memory stays on it.
        env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = "lo"
        return env

    def all_connected(self) -> None:
        """Take the socket's address away: nobody else is to come, and a client that is killed leaves nothing behind."""
        self.listener.close()
        shutil.rmtree(self.private, ignore_errors=True)

    def running(self) -> bool:
        """Whether torchrun has not ended."""
        return self.process is not None and self.process.poll() is None

    def forget(self) -> None:
        """Close what a forked child has of this, and leave the processes alone."""
        self.listener.close()
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def stop(self, grace: float = 1.5) -> None:
        """End all processes. The ranks end by themselves once their sockets are closed; whatever lingers is killed.

        Args:
            grace: seconds to wait before killing.
        """
        if self.process is None:
            return
        self.all_connected()
        assert self.process.stdin is not None
        if not self._ended_within(grace):
            self.process.stdin.close()  # the agent kills the ranks, stopped ones too
            if not self._ended_within(grace):
                self.process.kill()
        self.process.wait()
        self.process.stdin.close()

    def _ended_within(self, seconds: float) -> bool:
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return True
        return False

    # --- what can be said of a failure -------------------------------------------------------------------------------

    @property
    def _agent_log(self) -> Path:
        return self.logs / "torchrun.log"

    def log_of(self, rank: int | None) -> Path:
        """The log to look into: a rank's own, or torchrun's where the rank did not come so far."""
        own = None if rank is None else log_file(self.logs, rank)
        return own if own is not None and own.exists() else self._agent_log

    def explain(self, rank: int | None) -> str:
        """Why processes ended, once they have: rank, exit code or signal, and the last lines of its log.

        Args:
            rank: the one whose connection was lost, if any; torchrun knows better which one was first.
        """
        report = _read(self._agent_log)
        cause = re.search(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", report, re.DOTALL)
        how = ""
        if cause:
            rank, code = int(cause.group(1)), int(cause.group(2))
            how = f" with exit code {code}"
            if code < 0:
                with contextlib.suppress(ValueError):
                    how = f", killed by signal {-code} ({signal.Signals(-code).name})"
            if code == -signal.SIGKILL:
                how += "; where nobody did that, the system ran out of memory"
        who = "the worker launcher" if rank is None else f"rank {rank}"
        log = self.log_of(rank)
        tail = "\n".join(_read(log).strip().splitlines()[-12:])
        return f"{who} ended{how}; the end of its log ({log}):\n{tail or '(empty)'}"


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", error)
            raise ValueError(f"port {port} cannot be used ({reason}); leave the port at 0 to take a free one") from None


def _new_private_folder() -> Path:
    """A folder that nobody else can enter (mode 0700), with a path short enough for a socket's address."""
    folder = tempfile.mkdtemp(prefix="hybrid-dit-")
    if len(folder) > 90:  # an AF_UNIX address has 107 bytes
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="hybrid-dit-", dir="/tmp")
    return Path(folder)


def _new_log_folder() -> Path:
    root = home() / "logs"
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)  # a prompt's text may be in a traceback
    for old in sorted(root.iterdir())[: -KEPT_LOGS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=root, prefix=time.strftime("%Y%m%d-%H%M%S-")))
