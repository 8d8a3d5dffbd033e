"""torchrun on one host of a group: its arguments, the ranks' environment and socket, and what its log says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from pathlib import Path

from ...limits import threads_of_a_rank
from ...paths import SOCKET_NAME, compiler_caches
from ...planning.devices import Devices
from .. import boot
from .notices import Card

WORKER = "parallel_backend.runtime.rank.worker"

# Of the client's environment the workers must not see: allocator settings (cudaMallocAsync runs out of memory under
# NCCL), and the variables of a distributed job that the client itself may be part of.
_DROPPED = re.compile(
    r"PYTORCH_(CUDA_|HIP_)?ALLOC_CONF|(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
    # pytest's, which would have each test import anew.
    r"|PYTEST_CURRENT_TEST"
)


def torchrun_arguments(private: Path, logs: Path, ranks: int, device: str) -> list[str]:
    """What torchrun is to start on a host, and how: a number of ranks that connect to the socket in a folder."""
    return [
        *(f"--nproc-per-node={ranks}", "--max-restarts=0", "--monitor-interval=0.2", f"--log-dir={logs}"),
        *("--no-python", *boot.command(WORKER), "--socket", str(private / SOCKET_NAME), "--device", device),
        *("--log-folder", str(logs)),
    ]


def static_rendezvous(card: Card, host: int, address: str, port: int) -> list[str]:
    """Arguments with which the torchrun of a host finds those of the others."""
    return [
        *(f"--nnodes={card.hosts}", f"--node-rank={host}", "--rdzv-backend=static", f"--rdzv-id={card.nonce}"),
        *(f"--rdzv-endpoint={f'[{address}]' if ':' in address else address}:{port}", "--rdzv-conf=timeout=600"),
    ]


def ask_no_name_server() -> None:
    """Have this process, which is to be torchrun's, take this machine's name as it is.

    torchrun asks for the full one, for messages that nobody reads. Where name servers do not answer, that takes 10 to
    20 s each time.
    """
    socket.getfqdn = lambda name="": name or socket.gethostname()


def listen(private: Path, ranks: int) -> socket.socket:
    """The socket that a host's ranks connect to, in a folder of its own."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(private / SOCKET_NAME))
    (private / SOCKET_NAME).chmod(0o600)
    listener.listen(ranks)
    return listener


def inherited_environment(ranks: int, devices: Devices) -> dict[str, str]:
    """This process's environment as a number of ranks are to have it."""
    env = client_environment()
    env.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(ranks)))
    env["CUDA_VISIBLE_DEVICES"] = ",".join(devices.visible)
    return env


def client_environment() -> dict[str, str]:
    """This process's environment as workers of any group are to have it."""
    env = {key: value for key, value in os.environ.items() if not _DROPPED.fullmatch(key)}
    env |= compiler_caches()
    env[boot.IMPORT_PATH] = boot.import_path()
    return env


def describe_end(who: str, code: int | None, log: Path) -> str:
    """That somebody ended, how, as far as an exit code tells, and the last lines of a log."""
    how = "" if code is None else f" with exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = f", killed by signal {-code} ({signal.Signals(-code).name})"
    if code == -signal.SIGKILL:
        how += "; where nobody did that, the system ran out of memory"
    tail = "\n".join(_without_torchruns_report(read_log(log)).strip().splitlines()[-12:])
    return f"{who} ended{how}; the end of its log ({log}):\n{tail or '(empty)'}"


def _without_torchruns_report(text: str) -> str:
    """A log up to where torchrun reports that a rank has failed: what the rank said of it stands before that."""
    return re.split(r"^(?:[WE]\d{4} .*Sending process|E\d{4} .*failed \(exitcode)", text, maxsplit=1, flags=re.M)[0]


def read_log(file: Path) -> str:
    """What is in a log; nothing where it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
