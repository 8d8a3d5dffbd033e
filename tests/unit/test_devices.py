"""What a user writes as devices, against what the machine has: resolve_devices."""

import re

import pytest
import torch

from parallel_backend.planning import devices
from parallel_backend.planning.devices import Devices, resolve_devices


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the machine has so many GPUs, seen through this CUDA_VISIBLE_DEVICES."""

    def pretend(gpus: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


@pytest.mark.parametrize("spec", ["auto", "", " AUTO "], ids=repr)
def test_auto_takes_the_first_gpus(machine, spec):
    machine(4)
    assert resolve_devices(spec, 2) == Devices("cuda", ("0", "1"))


def test_auto_takes_the_cpu_where_there_is_no_gpu(machine):
    machine(0)
    assert resolve_devices("auto", 16) == Devices("cpu")


def test_cpu_is_the_cpu_even_where_there_are_gpus(machine):
    machine(4)
    assert resolve_devices(" CPU ", 16) == Devices("cpu")


@pytest.mark.parametrize("spec", ["3,1", "cuda:3,cuda:1", " cuda:3 , 1 "])
def test_a_list_keeps_its_order(machine, spec):
    machine(4)
    assert resolve_devices(spec, 2) == Devices("cuda", ("3", "1"))


@pytest.mark.parametrize(
    ("gpus", "spec", "ranks", "message"),
    [
        (2, "auto", 4, "has 4 ranks but this machine has 2 GPU(s); choose the device 'cpu', or degrees with a product"),
        (2, "0,2", 2, "the devices '0,2' name GPU 2, but this machine has 2 GPU(s)"),
        (0, "0", 1, "name GPU 0, but this machine has 0 GPU(s)"),
        (4, "1,1", 2, "the devices '1,1' name a GPU twice"),
        (4, "1,cuda:1", 2, "name a GPU twice"),
        (4, "0,1,2", 2, "the devices '0,1,2' are 3 GPU(s), but the layout has 2 rank(s)"),
        (4, "0", 2, "the devices '0' are 1 GPU(s), but the layout has 2 rank(s)"),
        (4, "gpu0", 1, "cannot read the device 'gpu0'; write 'auto', 'cpu', or GPUs such as '0,1,2,3'"),
        (4, "0,", 1, "cannot read the device ''"),
        (4, "-1", 1, "cannot read the device '-1'"),
        (4, "0-3", 4, "cannot read the device '0-3'"),
        (4, "0,cpu", 2, "cannot read the device 'cpu'"),
    ],
)
def test_what_cannot_work_is_refused(machine, gpus, spec, ranks, message):
    machine(gpus)
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_devices(spec, ranks)


@pytest.mark.parametrize(
    ("visible", "spec", "expected"),
    [
        ("6,4,5", "auto", ("6", "4")),
        ("6,4,5", "2,0", ("5", "6")),
        ("GPU-0a1b, GPU-2c3d ,GPU-4e5f", "1,2", ("GPU-2c3d", "GPU-4e5f")),
        ("", "0,2", ("0", "2")),
    ],
)
def test_an_inherited_list_of_visible_gpus_is_looked_through(machine, visible, spec, expected):
    """GPU 0 is the first one that this process sees, and the ranks must be given the name the driver knows it by."""
    machine(3, visible)
    assert resolve_devices(spec, 2) == Devices("cuda", expected)


def test_groups_overlap_where_they_share_a_gpu():
    assert Devices("cuda", ("0", "1")).overlaps(Devices("cuda", ("1", "2")))
    assert not Devices("cuda", ("0", "1")).overlaps(Devices("cuda", ("2", "3")))
    assert not Devices("cpu").overlaps(Devices("cpu"))
    assert not Devices("cpu").overlaps(Devices("cuda", ("0",)))


@pytest.mark.parametrize("spec", ["cpu", "auto"])
def test_more_ranks_than_a_cpu_can_do_with(machine, monkeypatch, spec):
    machine(0)
    monkeypatch.setattr(devices, "cores", lambda: 24)
    assert resolve_devices(spec, 24) == Devices("cpu")
    with pytest.raises(ValueError, match=r"25 ranks, .*a product of at most 24"):
        resolve_devices(spec, 25)
