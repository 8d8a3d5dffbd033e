"""What hides GPUs, by number, UUID and MIG, and what is taken of unlike ones."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch

from parallel_backend.config import ParallelismConfig
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.machine import Gpu, Machine
from parallel_backend.planning import auto_layout, gpu_speed, visible_gpus
from parallel_backend.planning.auto_layout import choose_for_checkpoint
from parallel_backend.planning.cost_model import Link
from parallel_backend.planning.devices import Devices, resolve_devices
from parallel_backend.planning.memory import GIB
from parallel_backend.planning.visible_gpus import automatic, hidden_gpus
from tests.tiny_pipeline import make_tiny_pipeline


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend that torch sees GPUs of these names (and GiB), of so many that are there."""

    def pretend(names: list[str], visible: str | None = None, present: int | None = None) -> Machine:
        gpus = [(name.partition(":")[0], int(name.partition(":")[2] or 24)) for name in names]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        # Two cards of a kind may differ by some MiB.
        sizes = [gib * GIB - index * 2**20 for index, (_, gib) in enumerate(gpus)]
        properties = [SimpleNamespace(name=gpu[0], total_memory=size) for gpu, size in zip(gpus, sizes, strict=True)]
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
        driver = tmp_path / "driver"
        for index in range(len(gpus) if present is None else present):
            (driver / f"0000:{index:02}:00.0").mkdir(parents=True)
        monkeypatch.setattr(visible_gpus, "DRIVER", driver)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(auto_layout, "_choices", {})
        monkeypatch.setattr(auto_layout, "_free", {})
        made = tuple(
            Gpu(i, name, size, size - GIB) for i, ((name, _), size) in enumerate(zip(gpus, sizes, strict=True))
        )
        found = Machine("Linux", "3.11", {}, gpus=made)
        monkeypatch.setattr(auto_layout, "collect", lambda: found)
        monkeypatch.setattr(gpu_speed, "PCIE", Link(1e9, 0.0))  # else so small a model would take one GPU
        return found

    yield pretend
    visible_gpus._say.cache_clear()


@pytest.mark.parametrize("visible", ["1", "GPU-0a1b2c3d"])
def test_the_variable_that_hides_gpus_is_named(machine, visible):
    """As ComfyUI's --cuda-device does, by number or UUID."""
    machine(["A"], visible, present=8)
    hides = re.escape(
        f"has 1 GPU(s) (CUDA_VISIBLE_DEVICES='{visible}' hides 7 of 8; unset it, or start ComfyUI without"
    )
    with pytest.raises(ValueError, match=rf"{hides} --cuda-device, which sets it\); choose the device 'cpu', or"):
        resolve_devices("auto", 2)
    with pytest.raises(ValueError, match=rf"name GPU 3, but this machine {hides}"):
        resolve_devices("0,3", 2)
    assert resolve_devices("auto", 1) == Devices("cuda", (visible,))


def test_gpus_that_are_all_hidden(machine, tmp_path):
    machine([], "", present=4)
    source = open_checkpoint(make_tiny_pipeline(tmp_path / "tiny"))
    reason = choose_for_checkpoint(source, "auto", "auto", "cast").reason
    assert reason.startswith("single: there is no GPU here (CUDA_VISIBLE_DEVICES='' hides 4 of 4")


@pytest.mark.parametrize(
    ("visible", "present"), [(None, 8), ("1,0," + ",".join(map(str, range(2, 32))), 2), ("0,1", 2), ("1,0", 0)]
)
def test_nothing_is_hidden(machine, visible, present):
    """Also where a variable only orders them, as ComfyUI's --default-device does, or the driver does not say."""
    machine(["A", "A"], visible, present)
    assert hidden_gpus(2) == ""


def test_mig_instances_are_one_to_a_process(machine):
    machine(["A"], "MIG-1111,MIG-2222", present=1)
    with pytest.raises(
        ValueError, match=r"names 2 MIG instance\(s\), of which a process can use one; take GPUs without"
    ):
        resolve_devices("auto", 2)
    assert resolve_devices("auto", 1) == Devices("cuda", ("MIG-1111",))


@pytest.mark.parametrize(
    ("names", "ranks", "expected"),
    [
        (["A", "B", "B", "A"], 2, ["0", "3"]),
        (["A", "B", "B"], 2, ["1", "2"]),
        (["A:24", "B:48", "A:24", "B:48"], 2, ["1", "3"]),
        (["A", "B"], 2, ["0", "1"]),  # there are no more
        (["A", "B", "C"], 2, ["0", "1"]),
        (["A:24", "A:48", "A:48"], 2, ["1", "2"]),  # one name, and other memory
        (["A", "A", "A"], 2, ["0", "1"]),
        (["A:24", "B:48"], 1, ["1"]),
    ],
)
def test_auto_prefers_gpus_of_one_kind(machine, names, ranks, expected):
    machine(names)
    assert resolve_devices("auto", ranks) == Devices("cuda", tuple(expected))


def test_what_was_taken_of_unlike_gpus_is_said_once(machine, caplog):
    machine(["GT 1030:2", "NVIDIA L20:48", "NVIDIA L20:48"], "5,6,7")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert resolve_devices("auto", 2) == Devices("cuda", ("6", "7"))
    assert [record.message for record in caplog.records] == [
        "auto takes GPU 1, 2 (2 x NVIDIA L20), of 3 unlike GPUs; name others in 'devices'"
    ]
    caplog.clear()
    machine_of_one_kind = [("A", 24)] * 3
    assert automatic(2, machine_of_one_kind) == [0, 1]
    assert not caplog.records


def test_gpus_that_torch_cannot_tell_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def broken(_: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert resolve_devices("auto", 2) == Devices("cuda", ("0", "1"))


class TestAutomaticLayout:
    @pytest.fixture
    def source(self, tmp_path):
        return open_checkpoint(make_tiny_pipeline(tmp_path / "tiny"))

    def test_the_fastest_kind_is_taken_and_said(self, machine, source):
        machine(["NVIDIA L20:48", "NVIDIA H200:140", "NVIDIA H200:140"])
        choice = choose_for_checkpoint(source, "auto", "auto", "cast")
        assert (choice.layout.world_size, choice.devices) == (2, "1,2")
        assert "auto takes GPU 1, 2 (2 x NVIDIA H200) and leaves NVIDIA L20 (GPU 0); name them" in choice.reason

    def test_a_card_that_is_not_known_is_not_taken_for_the_fastest(self, machine, source):
        machine(["Some GPU 9000:48", "NVIDIA L20:48", "NVIDIA L20:48"])
        assert choose_for_checkpoint(source, "auto", "auto", "cast").devices == "1,2"

    def test_all_kinds_where_none_has_room(self, machine, source, monkeypatch):
        found = machine(["NVIDIA L20:48", "NVIDIA H200:140"])

        def choose_layout(machine, gpus, *_):
            if len(gpus) < 2:
                raise ValueError("no layout fits")
            return auto_layout.Choice(ParallelismConfig(tp_size=2), (), f"of {len(gpus)}")

        monkeypatch.setattr(auto_layout, "choose_layout", choose_layout)
        choice = choose_for_checkpoint(source, "auto", "auto", "cast")
        assert (choice.reason, choice.devices) == (f"of {len(found.gpus)}", "")

    def test_named_gpus_are_taken_as_they_are(self, machine, source):
        machine(["NVIDIA L20:48", "NVIDIA H200:140", "NVIDIA H200:140"])
        choice = choose_for_checkpoint(source, "0,1,2", "auto", "cast")
        assert (choice.layout.world_size, choice.devices) == (3, "")

    def test_hidden_gpus_are_said(self, machine, source):
        machine(["NVIDIA L20:48"], "0", present=8)
        reason = choose_for_checkpoint(source, "auto", "auto", "cast").reason
        assert "(CUDA_VISIBLE_DEVICES='0' hides 7 of 8" in reason
