"""ComfyUI as a service: a container's first process, behind a proxy, without names or with one kind of addresses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .clients import KNOWN, ROOT, as_another_user, start_ranks, with_own
from .processes import Watched

pytestmark = pytest.mark.timeout(300)

ASKS = """
import socket, traceback

def asked(*arguments, **_):
    with open({file!r}, "a") as file:
        file.write(f"{{arguments}}: {{''.join(traceback.format_stack(limit=3))}}")
    raise socket.gaierror(-3, "Temporary failure in name resolution")

def only_numbers(host, *arguments, ask=socket.getaddrinfo, **named):
    return ask(host, *arguments, **named) if host is None or host[:1].isdigit() or ":" in host else asked(host)

socket.gethostbyaddr = socket.gethostbyname = asked
socket.getaddrinfo = only_numbers
"""
SILENT_SERVER = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
print("up", flush=True)
while True:
    data, _ = server.recvfrom(512)
    print(data, flush=True)
"""


def in_own_network(script: str, *what: str) -> dict[str, object]:
    """A group in a network namespace of its own, that a shell script has set up."""
    prefix = with_own("--net", "--mount", *what)
    return start_ranks(2, prefix=[*prefix, f'{script}\nexec "$@"', "sh"])


def test_behind_a_proxy_and_without_name_servers(tmp_path):
    """No process of a group asks who this machine is, nor a proxy for another process of it."""
    (tmp_path / "sitecustomize.py").write_text(ASKS.format(file=str(tmp_path / "asked")))
    nobody = "http://192.0.2.1:9"
    proxies = {f"{kind}_proxy": nobody for kind in ("http", "https", "all", "grpc")}
    proxies |= {name.upper(): value for name, value in proxies.items()} | {"no_proxy": None, "NO_PROXY": None}
    found = start_ranks(2, environment=proxies | {"PYTHONPATH": str(tmp_path)})
    assert "error" not in found
    asked = tmp_path / "asked"
    assert not asked.exists(), asked.read_text()


@pytest.mark.thorough
def test_a_name_server_that_does_not_answer(tmp_path):
    """Nobody asks it, native code included."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:10 attempts:2\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    (tmp_path / "server.py").write_text(SILENT_SERVER)
    files = {name: shlex.quote(str(tmp_path / name)) for name in ("resolv.conf", "hosts", "server.py", "said")}
    found = in_own_network(
        f"""
        ip link set lo up
        mount --bind {files["resolv.conf"]} /etc/resolv.conf
        mount --bind {files["hosts"]} /etc/hosts
        {sys.executable} {files["server.py"]} > {files["said"]} 2>&1 &
        trap "kill $!" EXIT
        until grep -q up {files["said"]}; do sleep 0.1; done
        "$@"
        exit
        """
    )
    assert "error" not in found
    assert (tmp_path / "said").read_text() == "up\n"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "script",
    [
        "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
        "ip link set lo up; ip address del 127.0.0.1/8 dev lo",
    ],
    ids=["no IPv6", "IPv6 only"],
)
def test_one_kind_of_addresses(script):
    found = in_own_network(script)
    assert "error" not in found
    assert len(found["ranks"]) == 2


def test_without_a_loopback_interface():
    found = in_own_network("")
    assert "ValueError: this machine has no loopback interface that is up" in found["error"]


def test_little_shared_memory(tmp_path):
    """Tensors, gloo and the ranks of the CPU need nothing of /dev/shm, which containers have 64 MiB of."""
    prefix = with_own("--mount")
    script = 'mount -t tmpfs -o size=64k none /dev/shm; mount -o remount,ro /dev/shm; exec "$@"'
    command = [
        *prefix,
        script,
        "sh",
        sys.executable,
        "-m",
        "parallel_backend",
        "demo",
        "--devices",
        "cpu",
        "--steps",
        "2",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "demo.png")], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.thorough
def test_few_open_files():
    """A shell's limit of open files, far below what eight ranks hold together, is raised as far as it may be."""
    script = 'ulimit -Sn 40; ulimit -Hn 4096; exec "$@"'
    found = start_ranks(8, prefix=["sh", "-ec", script, "sh"])
    assert "error" not in found
    assert len(found["ranks"]) == 8


def test_as_a_containers_first_process():
    """Whoever is killed, the processes that come to it are asked after when they have ended."""
    prefix = with_own("--pid", "--fork", "--mount-proc")
    zombies = start_ranks(prefix=[*prefix, 'exec "$@"', "sh"], call="as_first_process()")
    assert zombies == {"fork server": [], "agent": [], "rank": []}


@pytest.mark.thorough
@pytest.mark.parametrize("kill_mode", ["control-group", "process"])
def test_systemd_ends_it(kill_mode):
    """With KillMode=control-group each process is told to end, with KillMode=process ComfyUI's alone."""
    code = f"{KNOWN}\nfrom tests.runtime.start_ranks import main; main(2, True)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as client:
        found = json.loads(client.stdout.readline())
        everybody = [client.pid, found["fork server"], found["agent"], *found["ranks"]]
        with Watched(everybody) as watched:
            for pid in everybody if kill_mode == "control-group" else [client.pid]:
                os.kill(pid, signal.SIGTERM)
            assert watched.alive_after(10) == []


def test_a_fork_server_that_has_ended_is_asked_after():
    """It ends by itself after a while without a group, in a process that may not look again for days."""
    code = f"{KNOWN}\nfrom tests.runtime.start_ranks import main; main(1, True)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as client:
        found = json.loads(client.stdout.readline())
        os.kill(found["fork server"], signal.SIGKILL)
        until = time.monotonic() + 5
        while Path(f"/proc/{found['fork server']}").exists() and time.monotonic() < until:
            time.sleep(0.02)
        client.kill()
        assert not Path(f"/proc/{found['fork server']}").exists()


def test_a_read_only_disk_of_another_user():
    """A container with a read-only disk, a user without a name, and a small disk in memory for temporary files."""
    user = as_another_user()
    # Where it does not hide this checkout.
    folder = "/var/tmp" if Path(__file__).is_relative_to("/tmp") else "/tmp"
    script = f'mount -o remount,ro,bind /; mount -t tmpfs -o mode=1777 none {folder}; exec "$@"'
    prefix = [*with_own("--mount"), script, "sh"]
    found = start_ranks(
        prefix=[*prefix, *user],
        environment={"HOME": None, "HYBRID_DIT_HOME": None, "TMPDIR": None, "USER": None},
        folder=Path("/"),
    )
    assert "error" not in found
    assert found["logs"].startswith(f"{folder}/hybrid-dit-")
