"""``worker``: make this machine one of the hosts that a group of several runs on, until it is told to stop."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from types import FrameType
from typing import NoReturn

from ..paths import new_private_folder
from ..runtime.host_address import Hosts

HOST = "parallel_backend.runtime.hosts.host"

BETWEEN_SECONDS = 1.0
FAILED_SECONDS = 5.0
END_SECONDS = 5.0
"""How long the processes of a group may take to end before they are killed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--nnodes", type=int, required=True, help="number of hosts, with the one that has ComfyUI")
    parser.add_argument(
        "--rdzv-endpoint", required=True, metavar="ADDRESS:PORT", help="of the host with ComfyUI, as its layout says"
    )
    parser.add_argument(
        "--node-rank", type=int, help="which host this is; the one with ComfyUI is 0 (default: 1, if there are 2)"
    )
    parser.add_argument(
        "--devices", default="auto", help="auto (what the layout runs on), cpu, or GPUs such as 0,1 (default: auto)"
    )
    parser.add_argument(
        "--nproc-per-node", type=int, help="take part in layouts with this number of ranks a host only (default: any)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Take part in one group after the other; ends with SIGTERM (exit status 0) or Ctrl-C."""
    hosts = Hosts(arguments.nnodes, arguments.rdzv_endpoint)
    host = node_rank(hosts, arguments.node_rank)
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
    command = [
        *("--owner", owner, "--node-rank", str(host)),
        *(f"--nnodes={hosts.count}", f"--rdzv-endpoint={hosts.endpoint}", f"--devices={arguments.devices}"),
        *([] if arguments.nproc_per_node is None else [f"--nproc-per-node={arguments.nproc_per_node}"]),
    ]
    signal.signal(signal.SIGTERM, _stop)
    print(f"host {host} of {hosts.count}, for groups that start at {hosts.endpoint}; Ctrl-C ends this", flush=True)
    while True:
        _take_part(command)
        time.sleep(BETWEEN_SECONDS)


def node_rank(hosts: Hosts, given: int | None) -> int:
    """Which host this is.

    Raises:
        ValueError: it cannot be told, or there is no such host.
    """
    if not hosts.several:
        raise ValueError("--nnodes is 1: a group on one host needs no other; this command is for 2 and more")
    if given is None and hosts.count > 2:
        raise ValueError(f"of {hosts.count} hosts, each has to know which it is: give it --node-rank 1, 2 ...")
    host = 1 if given is None else given
    if not 1 <= host < hosts.count:
        raise ValueError(f"--node-rank {host} is not one of 1 to {hosts.count - 1}; the host with ComfyUI is 0")
    return host


def _take_part(command: list[str]) -> None:
    """Wait for a group and take part in it until it ends."""
    # They import torch, which other subcommands start without.
    from ..families import COMPONENTS, FAMILIES
    from ..runtime.client.fork_server import fork
    from ..runtime.forking import Order
    from ..runtime.hosts.torchrun import client_environment

    private = new_private_folder()
    # A group may be of any family, and there is time to import all until it comes.
    imports = [module for family in FAMILIES for component in COMPONENTS for module in family.imports(component)]
    process = fork(Order(HOST, [*command, "--private", str(private)], client_environment(), imports), 1)
    try:
        code = process.wait()
        if code:
            print(f"the process that takes part in groups ended with exit code {code}", flush=True)
            time.sleep(FAILED_SECONDS)
    finally:
        process.hang_up()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.close()
        shutil.rmtree(private, ignore_errors=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
