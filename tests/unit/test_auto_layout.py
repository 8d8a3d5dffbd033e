"""The choice of a layout on machines that are made up: what is taken, what is refused, and what is said of it."""

import json
import re
from dataclasses import replace

import pytest
import torch

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_name
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.machine import Gpu, Link, Machine
from parallel_backend.planning import auto_layout, gpu_speed
from parallel_backend.planning.auto_layout import (
    all_layouts,
    checkpoint_memory,
    choose_for_checkpoint,
    choose_for_reference,
)
from parallel_backend.planning.cost_model import Device, step_cost
from parallel_backend.planning.cost_model import Link as CostLink
from parallel_backend.planning.gpu_speed import HOST, NVLINK, PCIE, axis_links, device_of, link_between, slowest
from parallel_backend.planning.memory import GIB, can_split, reference_config
from parallel_backend.planning.workload import count_workload
from tests.single_file import flux2_tensors, write
from tests.tiny_pipeline import make_tiny_pipeline
from tests.wan_vae import write_wan_vae

FLUX2 = family_of_name("flux2")


def machine(count, name="NVIDIA H200", total=140, kind="NV18", peer=True, kinds=None):
    """A machine with GPUs that are linked alike, but for pairs in ``kinds``."""
    gpus = tuple(Gpu(i, name, total * GIB, total * GIB - GIB) for i in range(count))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    links = tuple(Link(a, b, peer, (kinds or {}).get((a, b), kind)) for a, b in pairs)
    return Machine("Linux", "3.11", {}, gpus=gpus, links=links)


def chosen(found):
    return choose_for_reference(found, range(len(found.gpus)), FLUX2)


@pytest.mark.parametrize("ranks", [1, 2, 6, 8, 12])
def test_all_layouts_are_all_of_them(ranks):
    degrees = [(x.ulysses_size, x.ring_size, x.tp_size) for x in all_layouts(ranks)]
    brute = [
        (u, r, t)
        for u in range(1, ranks + 1)
        for r in range(1, ranks + 1)
        for t in range(1, ranks + 1)
        if u * r * t == ranks
    ]
    assert sorted(degrees) == sorted(brute)


def test_eight_l20_get_the_layout_that_was_fastest_in_the_published_table():
    choice = chosen(machine(8, "NVIDIA L20", 48, "PHB"))
    assert choice.layout.name == "Ulysses-4-TP-2"
    assert "faster, but too large: Ulysses-8" in choice.reason
    assert [option.cost.ms for option in choice.options] == sorted(option.cost.ms for option in choice.options)
    assert {option.layout.name: option.fits for option in choice.options}["Ulysses-8"] is False
    # A heading, and a line for each option: the chosen one is marked, and what does not fit says so.
    lines = choice.table().splitlines()
    assert len(lines) == 1 + len(choice.options)
    assert [line.split()[0] for line in lines if "*" in line] == ["Ulysses-4-TP-2"]
    assert sum("does not fit" in line for line in lines) == sum(not option.fits for option in choice.options)


def test_with_room_the_weights_stay_whole():
    assert chosen(machine(8)).layout.tp_size == 1


def test_the_fastest_that_fits_is_taken():
    for total in (20, 30, 48, 80, 140):
        choice = chosen(machine(8, total=total))
        fitting = [option for option in choice.options if option.need <= (total - 1) * GIB]
        assert choice.layout == min(fitting, key=lambda option: option.cost.ms).layout


def test_copy_engines_exchange_where_all_gpus_reach_each_other():
    assert [chosen(machine(count)).copies for count in (1, 2, 3)] == [False, True, True]
    assert not chosen(machine(2, peer=False)).copies


def test_steps_of_small_models_take_some_time_too():
    assert re.search(r"about [1-9]\.\d\d s a step at 1024 x 1024", chosen(machine(2, "NVIDIA L20", 80)).reason)
    assert [auto_layout._time(ms) for ms in (1234.0, 100.0, 99.94, 1.26)] == ["1.23 s", "0.10 s", "99.9 ms", "1.3 ms"]


def test_heads_that_do_not_divide_are_left_out():
    names = [option.layout.name for option in chosen(machine(5)).options]
    assert names == ["Ring-5"]  # 48 heads


def test_nothing_that_fits_is_an_error_with_the_nearest_layout():
    with pytest.raises(
        ValueError, match=r"no layout of FLUX.2-dev fits 2 GPU\(s\): TP-2 needs least, 5\d\.\d GiB each"
    ):
        chosen(machine(2, total=24))


def test_unknown_gpus_are_named():
    assert "Some GPU 9000 is taken as fast as an H200" in chosen(machine(2, "Some GPU 9000")).reason


def test_links_between_gpus():
    mixed = machine(4, kind="SYS", kinds={(0, 1): "NV4", (2, 3): "NV4"})
    assert link_between(mixed, 1, 0).gb_per_s == pytest.approx(NVLINK.gb_per_s * 4 / 18)
    assert link_between(mixed, 1, 2) == PCIE
    assert link_between(machine(2, peer=False), 0, 1) == HOST
    assert link_between(machine(2, kind=""), 0, 1) == PCIE


def test_an_axis_is_as_fast_as_its_slowest_link():
    # Two pairs with bridges: adjacent ranks are tp's.
    mixed = machine(4, kind="SYS", kinds={(0, 1): "NV4", (2, 3): "NV4"})
    links = axis_links(mixed, range(4), ParallelismConfig(ulysses_size=2, tp_size=2))
    assert (links["tp"].gb_per_s > PCIE.gb_per_s, links["ulysses"]) == (True, PCIE)
    # In another order of the GPUs it is the other way round.
    links = axis_links(mixed, [0, 2, 1, 3], ParallelismConfig(ulysses_size=2, tp_size=2))
    assert (links["tp"], links["ulysses"].gb_per_s > PCIE.gb_per_s) == (PCIE, True)
    # A ring of four goes over each link between neighbours, the last to the first too.
    assert axis_links(mixed, range(4), ParallelismConfig(ring_size=4)) == {"ring": PCIE}
    assert axis_links(mixed, range(4), ParallelismConfig()) == {}


def test_devices_by_name():
    assert device_of("NVIDIA H200") == Device()
    assert device_of("NVIDIA H100 80GB HBM3").compute == 1
    assert device_of("NVIDIA L20").compute == pytest.approx(6, rel=0.1)
    assert device_of("NVIDIA H20").compute > 5  # not an H200
    assert device_of("NVIDIA L40S").compute < device_of("NVIDIA L20").compute
    assert device_of("Some GPU 9000") is None


SLOW = CostLink(0.5, 1.0)
"""Such as of GPUs in slots of one lane."""


class TestFewerGpus:
    """Exchanges over slow links may take longer than what is saved by them."""

    def predicted(self, found, gpus):
        """The fastest step on all of some GPUs of a machine."""
        work = count_workload(FLUX2, reference_config(FLUX2), 1024, 1024)
        device = slowest([found.gpus[gpu] for gpu in gpus])[0]
        layouts = [layout for layout in all_layouts(len(gpus)) if can_split(FLUX2, layout)]
        return min(step_cost(work, layout, axis_links(found, gpus, layout), device).ms for layout in layouts)

    def test_auto_takes_one_where_links_are_slower_than_work(self, monkeypatch):
        monkeypatch.setattr(gpu_speed, "PCIE", SLOW)
        found = machine(4, kind="PHB")
        choice = chosen(found)
        assert (choice.layout, choice.devices) == (ParallelismConfig(), "0")
        assert re.search(r"single of 1 GPU\(s\): .*, on GPU 0: \S+ of all 4 would take \d", choice.reason)
        assert self.predicted(found, [0]) < min(self.predicted(found, range(count)) for count in (2, 3, 4))

    def test_auto_takes_the_pair_that_a_bridge_joins(self, monkeypatch):
        monkeypatch.setattr(gpu_speed, "PCIE", SLOW)
        choice = chosen(machine(4, kind="SYS", kinds={(1, 3): "NV4"}))
        assert choice.devices == "1,3"
        assert choice.layout.world_size == 2

    @pytest.mark.parametrize("links", ["NV18", "PHB"])
    @pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA L20"])
    @pytest.mark.parametrize("count", [2, 4, 6, 8])
    def test_never_slower_than_any_smaller_number(self, name, links, count):
        found = machine(count, name, 400, links)
        ms = chosen(found).ms
        assert 0 < ms <= min(self.predicted(found, range(some)) for some in (1, 2, 3, 4, 6, 8) if some <= count)

    def test_fast_links_leave_none_out(self):
        for count in (2, 4, 8):
            choice = chosen(machine(count))
            assert (choice.layout.world_size, choice.devices) == (count, "")

    def test_where_only_some_have_room(self):
        found = machine(3)
        full = replace(found.gpus[1], free=0)
        choice = chosen(replace(found, gpus=(found.gpus[0], full, found.gpus[2])))
        assert choice.devices == "0,2"
        assert "all of them have no room for it" in choice.reason

    def test_named_gpus_are_taken_and_the_choice_warns(self, tiny, monkeypatch):
        monkeypatch.setattr(auto_layout, "collect", lambda: machine(2, kind="PHB"))
        choice = choose_for_checkpoint(tiny, "0,1", "auto", "cast")
        assert choice.layout.world_size == 2
        assert re.search(r"; SLOWER than fewer GPUs: single on GPU 0 would take \d", choice.reason)

    def test_a_checkpoint_gets_fewer_too(self, tiny, monkeypatch):
        monkeypatch.setattr(auto_layout, "collect", lambda: machine(2, kind="PHB"))
        choice = choose_for_checkpoint(tiny, "auto", "auto", "cast")
        assert (choice.layout, choice.devices) == (ParallelismConfig(), "0")

    def test_degrees_set_by_hand_are_warned_of(self, tiny, monkeypatch):
        two = ParallelismConfig(ulysses_size=2)
        assert auto_layout.warning_of(tiny, "1", ParallelismConfig(), "auto", "cast") == ""
        assert auto_layout.warning_of(tiny, "cpu", two, "auto", "cast") == ""
        monkeypatch.setattr(auto_layout, "collect", lambda: machine(2, kind="PHB"))
        text = auto_layout.warning_of(tiny, "auto", two, "auto", "cast")
        assert re.match(r"Ulysses-2: about \d+\.\d ms a step at 1024 x 1024; SLOWER than fewer GPUs: single on", text)
        with pytest.raises(ValueError, match="2 rank"):
            auto_layout.warning_of(tiny, "0", two, "auto", "cast")
        fast = CostLink(1e9, 0.0)
        monkeypatch.setattr(gpu_speed, "PCIE", fast)
        assert auto_layout.warning_of(tiny, "auto", two, "auto", "cast") == ""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A checkpoint, and a machine with two GPUs for it."""
    monkeypatch.setattr(auto_layout, "_choices", {})
    monkeypatch.setattr(auto_layout, "_free", {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(auto_layout, "collect", lambda: machine(2))
    monkeypatch.setattr(gpu_speed, "NVLINK", CostLink(1e9, 0.0))  # else so small a model would take one GPU
    return open_checkpoint(make_tiny_pipeline(tmp_path / "tiny"))


def test_a_checkpoint_is_counted_by_its_own_weights(tiny):
    whole = checkpoint_memory(tiny, ParallelismConfig(), torch.float32, "cast").weights
    config = json.loads((tiny.path / "transformer" / "config.json").read_text())
    numel = sum(p.numel() for p in FLUX2.transformer.build(config).parameters())
    assert whole.transformer == 4 * numel
    half = checkpoint_memory(tiny, ParallelismConfig(tp_size=2), torch.float32, "cast").weights
    assert whole.transformer / 2 < half.transformer < whole.transformer * 0.75  # embedders are not split
    assert checkpoint_memory(tiny, ParallelismConfig(), torch.bfloat16, "cast").weights.transformer == 2 * numel


def test_the_text_encoder_of_another_model_of_the_family_is_not_counted(tmp_path):
    """FLUX.2 klein, whose contexts are narrower: its Qwen3 stays in ComfyUI, and FLUX.2-dev's 32 GiB are nowhere."""
    klein = open_checkpoint(write(tmp_path / "klein.safetensors", flux2_tensors(guidance=False)))
    assert checkpoint_memory(klein, ParallelismConfig(), torch.bfloat16, "cast").weights.text_encoder == 0
    dev = dict(FLUX2.transformer.build({}).config)["joint_attention_dim"]
    tensors = {**flux2_tensors(), "txt_in.weight": torch.zeros(256, dev)}
    like_dev = open_checkpoint(write(tmp_path / "dev.safetensors", tensors))
    weights = checkpoint_memory(like_dev, ParallelismConfig(), torch.bfloat16, "cast").weights
    assert weights.text_encoder == pytest.approx(32.3 * GIB, rel=0.01)


def test_a_checkpoint_gets_the_same_choice_again_whatever_is_free_by_then(tiny, monkeypatch):
    first = choose_for_checkpoint(tiny, "auto", "auto", "cast")
    assert first.layout.world_size == 2
    monkeypatch.setattr(auto_layout, "collect", lambda: machine(2, total=2))  # our own workers have taken the rest
    assert choose_for_checkpoint(tiny, "auto", "auto", "cast") is first
    # Another dtype is looked at anew, with what was free before.
    assert choose_for_checkpoint(tiny, "0,1", "float32", "cast").layout.world_size == 2


def test_named_gpus_are_all_that_is_used(tiny):
    assert choose_for_checkpoint(tiny, "1", "auto", "cast").layout == ParallelismConfig()


def test_a_vae_alone_gets_all_gpus_whatever_fits(tmp_path, monkeypatch):
    """It is small, and where all GPUs are one group, it is in the transformer's: nothing of that is counted."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(auto_layout, "collect", lambda: machine(3, total=2))
    vae = open_checkpoint(write_wan_vae(tmp_path / "wan.safetensors"))
    assert choose_for_checkpoint(vae, "auto", "auto", "cast").layout.world_size == 3
    assert choose_for_checkpoint(vae, "0,2", "auto", "cast").layout.world_size == 2
    assert choose_for_checkpoint(vae, "cpu", "auto", "cast").layout == ParallelismConfig()


def test_on_the_cpu_nothing_is_split(tiny, monkeypatch):
    assert choose_for_checkpoint(tiny, "cpu", "auto", "cast").layout == ParallelismConfig()
    monkeypatch.setattr(auto_layout, "collect", lambda: machine(0))
    choice = choose_for_checkpoint(tiny, "auto", "auto", "cast")
    assert (choice.layout, choice.reason) == (ParallelismConfig(), "single: there is no GPU here")
