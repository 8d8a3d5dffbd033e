"""What the doctor says of folders, limits, networks and hidden GPUs, and that it leaves nothing behind."""

import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

from parallel_backend import limits, paths
from parallel_backend.cli import surroundings as module
from parallel_backend.cli.surroundings import surroundings
from parallel_backend.limits import Memory
from parallel_backend.machine import Gpu, Machine
from parallel_backend.planning import visible_gpus

GIB = 2**30
MACHINE = Machine("Linux", "3.11", {})


@pytest.fixture(autouse=True)
def usual(tmp_path, monkeypatch):
    """Surroundings that nothing is to be said of."""
    monkeypatch.setenv("HYBRID_DIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(limits, "cores", lambda: 4)
    monkeypatch.setattr(limits, "memory", lambda: Memory(64 * GIB, 60 * GIB))
    monkeypatch.setattr(limits, "most_open_files", lambda: 4096)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def said(machine: Machine = MACHINE) -> str:
    """All findings but that logs go to the home, a line each."""
    return "\n".join(f"{level} {text} -> {remedy}" for level, text, remedy in surroundings(machine)[1:])


def test_nothing_is_said_of_usual_surroundings_and_nothing_is_left(tmp_path):
    before = sorted(Path("/tmp").glob("hybrid-dit-*"))
    assert [finding.text for finding in surroundings(MACHINE)] == [f"logs of groups go to {tmp_path / 'home' / 'logs'}"]
    assert not list((tmp_path / "home" / "logs").iterdir())
    assert sorted(Path("/tmp").glob("hybrid-dit-*")) == before


def test_a_home_that_cannot_be_used(monkeypatch):
    monkeypatch.setenv("HYBRID_DIT_HOME", "/proc/none")
    first = surroundings(MACHINE)[0]
    assert first.level == "FAIL"
    assert "'/proc/none' of HYBRID_DIT_HOME cannot be used" in first.text


def test_logs_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.delenv("HYBRID_DIT_HOME")
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = surroundings(MACHINE)[0]
    assert (first.level, first.text) == (
        "warn",
        f"/proc/.cache/hybrid-dit cannot be used: logs of groups go to {tmp_path}/hybrid-dit-{os.geteuid()}/logs",
    )


def test_a_disk_without_modes(monkeypatch):
    monkeypatch.setattr(module, "_open_to_others", lambda folder: True)
    assert re.search(r"warn the disk of .* keeps no modes: other users .* -> set HYBRID_DIT_HOME", said())


def test_no_folder_for_a_socket(monkeypatch):
    def none() -> Path:
        raise ValueError("no folder can hold a socket (/tmp: No space left on device)")

    monkeypatch.setattr(paths, "new_private_folder", none)
    assert said().startswith("FAIL no folder can hold a socket")


def test_a_temporary_folder_that_holds_no_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("画" * 40)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert f"ok the folder for temporary files, {deep}, cannot hold sockets; groups use" in said()


@pytest.mark.parametrize("program", ["", "/no/python", None])
def test_a_python_without_a_program(program, monkeypatch):
    monkeypatch.setattr(sys, "executable", program)
    assert said().startswith("FAIL this Python does not know its own program")


def test_cores_and_threads(monkeypatch):
    monkeypatch.setattr(limits, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    fewer, threads = said().splitlines()
    assert fewer.startswith("ok 2 of 4 CPU cores are left to ComfyUI by its affinity, container or Slurm job")
    assert threads.startswith("warn OMP_NUM_THREADS is 3, but there are 2 CPU core(s)")


@pytest.mark.parametrize(("gib", "level"), [(8, "warn"), (48, "ok")])
def test_memory_of_a_container(monkeypatch, gib, level):
    monkeypatch.setattr(limits, "memory", lambda: Memory(gib * GIB, GIB, "/sys/fs/cgroup/memory.max"))
    assert said().startswith(f"{level} memory is limited to {gib}.0 GiB (/sys/fs/cgroup/memory.max)")


def test_few_open_files(monkeypatch):
    monkeypatch.setattr(limits, "most_open_files", lambda: 256)
    assert said().startswith("warn a process may have 256 files open, and ranks may need 1024 -> raise it")


def test_no_loopback(monkeypatch):
    def none() -> str:
        raise ValueError("this machine has no loopback interface that is up")

    monkeypatch.setattr(module, "loopback", none)
    assert said() == "FAIL this machine has no loopback interface that is up -> ip link set lo up"


def test_hidden_and_unlike_gpus(monkeypatch, tmp_path):
    for index in range(5):
        (tmp_path / "driver" / str(index)).mkdir(parents=True)
    monkeypatch.setattr(visible_gpus, "DRIVER", tmp_path / "driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    gpus = tuple(Gpu(i, name, 24 * GIB - i, 20 * GIB) for i, name in enumerate(["A", "B", "B"]))
    hidden, unlike = said(dataclasses.replace(MACHINE, gpus=gpus)).splitlines()
    assert "warn this Python sees 3 GPU(s) (CUDA_VISIBLE_DEVICES='0,1,2' hides 2 of 5;" in hidden
    assert unlike.startswith("ok the GPUs are unlike (GPU 0: A; GPU 1, 2: B): 'auto' takes those of one kind")
