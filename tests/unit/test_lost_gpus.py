"""A GPU that falls off the bus is left out from then on, and the others go on; a program's fault costs no GPU."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
import torch

from parallel_backend.planning import lost_gpus
from parallel_backend.planning.devices import Devices, TooManyRanksError, resolve_devices
from parallel_backend.planning.lost_gpus import lose
from parallel_backend.runtime.client import groups
from parallel_backend.runtime.client.worker_group import WorkerGroup
from parallel_backend.runtime.errors import WorkersFailedError
from parallel_backend.runtime.group_config import GroupConfig
from parallel_backend.runtime.wire.messages import Failed

GONE = "AcceleratorError: CUDA error: GPU is lost"
UNCLEAR = "AcceleratorError: CUDA error: unspecified launch failure"


@pytest.fixture(autouse=True)
def _nothing_is_lost(monkeypatch):
    monkeypatch.setattr(lost_gpus, "_lost", {})


@pytest.fixture
def gpus(monkeypatch):
    """Three of them, which the driver calls 4, 5 and 6."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Has nvidia-smi be a script."""

    def write(script: str) -> None:
        file = tmp_path / "nvidia-smi"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return write


def test_auto_goes_on_with_the_others(gpus, caplog):
    assert resolve_devices("auto", 3) == Devices("cuda", ("4", "5", "6"))
    with caplog.at_level(logging.WARNING):
        assert lose("5", GONE)
        assert lose("5", GONE)
    assert [record.message for record in caplog.records] == [
        f"GPU 5 is left out of 'auto' until this process is started again: {GONE}"
    ]
    assert resolve_devices("auto", 2) == Devices("cuda", ("4", "6"))
    assert resolve_devices("auto", 1) == Devices("cuda", ("4",))
    with pytest.raises(TooManyRanksError, match=r"3 GPU\(s\).* \(GPU 1 failed and is left out\); .* of at most 2"):
        resolve_devices("auto", 3)
    # Who names it has it tried.
    assert resolve_devices("1", 1) == Devices("cuda", ("5",))


@pytest.mark.parametrize(
    ("script", "lost"),
    [
        ("echo NVIDIA L20", False),
        ("echo 'Unable to determine the device handle for GPU0000:0B:00.0: GPU is lost.'; exit 15", True),
        ("echo '[GPU is lost]'", True),
        ("exec sleep 60", True),
    ],
)
def test_where_the_error_is_unclear_nvidia_smi_is_asked(nvidia_smi, monkeypatch, script, lost):
    monkeypatch.setattr(lost_gpus, "ANSWER_SECONDS", 0.3 if "sleep" in script else 20.0)
    nvidia_smi(script)
    assert lose("5", UNCLEAR) is lost


def test_a_fault_of_a_program_costs_no_gpu(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi("exit 15")
    assert not lose("5", "AcceleratorError: CUDA error: an illegal memory access was encountered")
    assert not lose("5", "CUDA out of memory. Tried to allocate 2.50 GiB.")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert not lose("5", UNCLEAR)  # nobody there to be asked


def group_on(devices: Devices, folder: Path) -> WorkerGroup:
    """A group of two ranks that was never started."""
    group = WorkerGroup(GroupConfig(devices, 2))
    group._launcher.logs = folder
    return group


def test_the_gpu_of_the_rank_that_failed_is_left_out(tmp_path):
    group = group_on(Devices("cuda", ("4", "6")), tmp_path)
    failures = [
        Failed(1, 0, "RuntimeError: NCCL", False),
        Failed(1, 1, GONE, False, device="GPU 6, L20", device_failed=True),
    ]
    with pytest.raises(WorkersFailedError, match=r"^GPU 6, L20 of rank 1 failed"):
        group._failed(failures)
    assert set(lost_gpus._lost) == {"6"}


def test_on_the_cpu_there_is_none_to_lose(tmp_path):
    group = group_on(Devices("cpu"), tmp_path)
    with pytest.raises(WorkersFailedError, match=r"^the CPU of rank 0 failed"):
        group._failed([Failed(1, 0, GONE, False, device="the CPU", device_failed=True)])
    assert lost_gpus._lost == {}


def test_a_rank_that_finds_no_gpu_when_it_starts(monkeypatch, tmp_path):
    group = group_on(Devices("cuda", ("4", "6")), tmp_path)
    monkeypatch.setattr(group._launcher, "explain", lambda rank: "rank 1 ended: CUDA error: invalid device ordinal")
    monkeypatch.setattr(group._launcher, "first_to_fail", lambda seconds=0.0: (1, 1))
    assert group._explained(None).startswith("rank 1 ended")
    assert set(lost_gpus._lost) == {"6"}


class Ending:
    """A group whose processes end after it was looked at so many times; None: never."""

    def __init__(self, devices: Devices, looks: int | None) -> None:
        self.config, self.looks = GroupConfig(devices, max(1, len(devices.visible))), looks

    def ended(self, seconds: float = 0.0) -> bool:
        if self.looks is not None:
            self.looks -= 1
        return self.looks is not None and self.looks < 0


@pytest.fixture
def ending(monkeypatch):
    """Groups that have been closed."""
    found: list[Ending] = []
    monkeypatch.setattr(groups, "_ending", found)
    monkeypatch.setattr(groups, "_groups", {})
    return found


def test_processes_that_the_driver_holds_hold_up_nobody_on_other_gpus(ending):
    ending += [Ending(Devices("cuda", ("6",)), None), Ending(Devices("cuda", ("4", "5")), 2)]
    group = groups._make_way(GroupConfig(Devices("cuda", ("4",)), 1), lambda: None, 0)
    assert group.state == "new"
    assert [old.config.devices.visible for old in ending] == [("6",)]


def test_who_needs_their_gpu_is_told(ending, monkeypatch):
    monkeypatch.setattr(groups, "ENDING_SECONDS", 0.0)
    ending.append(Ending(Devices("cuda", ("5", "6")), None))
    with pytest.raises(WorkersFailedError, match=r"on GPU 5, 6 have been killed and have not ended for 0 s"):
        groups._make_way(GroupConfig(Devices("cuda", ("6",)), 1), lambda: None, 0)
    assert groups._groups == {}
