"""The doctor: what it says of machines that are made up, and its exit status."""

import argparse
import dataclasses
import json
import re
import sys

import pytest
import torch

from parallel_backend import machine
from parallel_backend.cli import doctor
from parallel_backend.cli.doctor import GIB, check_machine
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_name
from parallel_backend.machine import Gpu, Link, Machine, parse_topology

GOOD = Machine(
    system="Linux",
    python="3.11.7",
    versions={
        "torch": "2.13.0+cu130",
        "diffusers": "0.42.1",
        "transformers": "5.23.0",
        "safetensors": "0.8.0",
        "pillow": "12.0.0",
        "numpy": "2.4.0",
        "tqdm": "4.67.1",
    },
    cuda="13.0",
    nccl="2.28.9",
    cores=16,
    memory_total=128 * GIB,
    memory_available=120 * GIB,
    shm_total=8 * GIB,
    shm_free=8 * GIB,
)
CPU_ONLY = dataclasses.replace(GOOD, cuda=None, nccl=None, cores=2, memory_total=24 * GIB)


def with_gpus(count, total=80, free=None):
    """The good machine with GPUs of so many GiB."""
    free = total if free is None else free
    gpus = tuple(Gpu(index, "Test GPU", int(total * GIB), int(free * GIB)) for index in range(count))
    return dataclasses.replace(GOOD, gpus=gpus)


@pytest.fixture
def examine(monkeypatch, capsys):
    """Run the doctor on a made-up machine: its exit status and what it printed."""

    def examine(machine, *arguments):
        monkeypatch.setattr(doctor, "collect", lambda: machine)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(machine.gpus))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        parser = argparse.ArgumentParser()
        doctor.add_arguments(parser)
        status = doctor.run(parser.parse_args(arguments))
        return status, capsys.readouterr().out

    return examine


def failures(machine):
    return [finding for finding in check_machine(machine) if finding.level == "FAIL"]


def warnings(machine):
    return [finding for finding in check_machine(machine) if finding.level == "warn"]


def test_this_very_machine_can_be_examined():
    machine = doctor.collect()
    assert machine.cores >= 1
    assert machine.versions["torch"] == torch.__version__
    assert len(machine.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("name", "version", "remedy"),
    [
        ("torch", "2.9.1+cu128", "install torch, torchvision and torchaudio of one newer release together"),
        ("diffusers", "0.37.1", f"{sys.executable} "),
        ("transformers", "4.57.1", f"{sys.executable} -m pip install 'transformers>=5.0' diffusers==0.42.1"),
        ("numpy", "1.24.4", f"{sys.executable} -m pip install 'numpy>=1.25' transformers==5.23.0 diffusers==0.42.1"),
        ("torch", None, "install torch, torchvision and torchaudio of one newer release together"),
    ],
)
def test_old_or_missing_versions_fail_and_the_remedy_is_named(examine, name, version, remedy):
    machine = dataclasses.replace(with_gpus(8), versions={**GOOD.versions, name: version})
    status, out = examine(machine)
    assert status == 1
    assert f"-> {remedy}" in out
    assert (f"{name} {version} is too old" if version else f"{name} is not installed") in out


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git", "2.13.0+cpu", "3.0"])
def test_new_enough_versions_pass(version):
    assert not failures(dataclasses.replace(GOOD, versions={**GOOD.versions, "torch": version}))


def test_models_that_cannot_be_imported_fail_without_a_traceback(examine, monkeypatch):
    import parallel_backend.planning.memory

    def broken(*arguments):
        raise RuntimeError("Failed to import diffusers.pipelines.flux2")

    monkeypatch.setattr(parallel_backend.planning.memory, "layout_fits", broken)
    status, out = examine(with_gpus(2))
    assert status == 1
    assert "the models cannot be imported: Failed to import diffusers.pipelines.flux2" in out


def test_families_that_there_are_not_fail(examine):
    status, out = examine(with_gpus(2), "--model", "flux9")
    assert status == 1
    assert "FAIL there is no model 'flux9'; there are: flux2 (FLUX.2-dev, FLUX.2-klein-4B, " in out


@pytest.mark.parametrize(
    ("name", "family"),
    [("flux2", "flux2"), ("FLUX.2-dev", "flux2"), ("flux", "flux2"), ("qwen", "qwen_image"), ("edit", "qwen_image"),
     ("qwen-image", "qwen_image"), ("Qwen-Image-Edit-2511", "qwen_image"), ("2512", "qwen_image"),
     ("klein-4b", "flux2"), ("z-image", "z_image"), ("Z-Image-Turbo", "z_image"), ("turbo", "z_image")],
)  # fmt: skip
def test_short_names(name, family):
    assert family_of_name(name).name == family


def test_a_name_that_may_be_several_is_refused():
    with pytest.raises(ValueError, match=r"'e' may be FLUX\.2 or Qwen-Image"):
        family_of_name("e")
    with pytest.raises(ValueError, match="there is no model ''"):
        family_of_name("")


def test_a_torchvision_of_another_torch_is_named(examine, monkeypatch, tmp_path):
    import parallel_backend.planning.memory

    def broken(*arguments):
        raise RuntimeError("Failed to import transformers.models.mistral3")

    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(doctor.metadata, "version", {"torchvision": "0.28.0+cu130", "torch": "2.13.0+cpu"}.get)
    monkeypatch.setattr(parallel_backend.planning.memory, "layout_fits", broken)
    status, out = examine(with_gpus(2))
    assert status == 1
    assert "FAIL torchvision 0.28.0+cu130 does not work with torch 2.13.0+cpu: operator torchvision::nms does" in out
    assert "pip install 'torch>=" not in out


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (
            with_gpus(2, total=22.8),
            ["in bf16 does not fit 2", "mistral_3_small_flux2_fp8.safetensors fits all 2 GPU(s) as TP-2 *"],
        ),
        (with_gpus(2, total=80), ["in bf16 fits all 2 GPU(s) as TP-2\n", "fits all 2 GPU(s) as Ulysses-2\n"]),
        (CPU_ONLY, ["in bf16: 2 x 24 GB: no, 2 x 32 GB: no, 2 x 48 GB: TP-2 *, 2 x 80 GB: TP-2"]),
    ],
)
def test_what_fits_is_said_for_each_format(examine, machine, said):
    _, out = examine(machine)
    for text in said:
        assert text in out


def test_another_family(examine):
    status, out = examine(with_gpus(2, total=48), "--model", "qwen_image", "--json", "--tp", "2")
    report = json.loads(out)
    assert (status, report["model"]) == (0, "Qwen-Image")
    assert [finding["text"] for finding in report["findings"]][-1] == "Qwen-Image fits with TP-2"
    status, out = examine(with_gpus(5), "--model", "qwen_image", "--ulysses", "5")
    assert status == 1
    assert "this Qwen-Image transformer has 24 attention heads" in out


def test_what_workers_cannot_do_without():
    assert not failures(with_gpus(2))
    assert "memfd_create" in failures(dataclasses.replace(GOOD, memfd=False))[0].text
    assert "gloo" in failures(dataclasses.replace(GOOD, gloo=False))[0].text
    assert "NCCL" in failures(dataclasses.replace(with_gpus(2), nccl=None))[0].text
    assert not failures(dataclasses.replace(with_gpus(1), nccl=None))


def test_small_shm_is_a_warning_where_gpus_exchange_through_it():
    """Nothing else needs it; see `tests.runtime.test_services`."""
    small = {"shm_total": 64 * 2**20, "shm_free": 64 * 2**20}
    assert not warnings(dataclasses.replace(GOOD, **small))
    assert not warnings(dataclasses.replace(with_gpus(2), links=(Link(0, 1, True),), **small))
    apart = dataclasses.replace(with_gpus(2), links=(Link(0, 1, False),))
    peer, shm = warnings(dataclasses.replace(apart, **small))
    assert "no peer access" in peer.text
    assert "/dev/shm has 0.06 GiB free" in shm.text
    assert "--shm-size" in shm.remedy
    for enough in ({}, {"shm_total": None, "shm_free": None}):
        assert len(warnings(dataclasses.replace(apart, **enough))) == 1


@pytest.mark.parametrize(("value", "warned"), [("1", True), ("0", False), ("", False)])
def test_nccl_p2p_disable(value, warned):
    found = warnings(dataclasses.replace(GOOD, environment={"NCCL_P2P_DISABLE": value}))
    assert [finding.remedy[:22] for finding in found] == (["unset NCCL_P2P_DISABLE"] if warned else [])


def test_allocator_settings_are_told_but_harmless():
    found = check_machine(dataclasses.replace(GOOD, environment={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}))
    assert [finding.level for finding in found if "our workers drop it" in finding.text] == ["ok"]


def test_gpus_without_peer_access_are_named():
    links = (Link(0, 1, True, "NV18"), Link(0, 2, False, "SYS"))
    (warning,) = warnings(dataclasses.replace(with_gpus(3), links=links))
    assert "between GPUs 0-2:" in warning.text


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}}, "unset CUDA_VISIBLE_DEVICES"),
        ({"cuda": None}, "install a CUDA build"),
        ({}, "update the NVIDIA driver"),
    ],
)
def test_gpus_that_torch_does_not_see(change, remedy):
    (warning,) = warnings(dataclasses.replace(GOOD, driver_gpus=2, **change))
    assert "nvidia-smi sees 2 GPU(s)" in warning.text
    assert warning.remedy.startswith(remedy)


def test_more_ranks_than_devices(examine):
    status, out = examine(with_gpus(4), "--ring", "5")
    assert status == 1
    assert "FAIL the layout has 5 ranks but this machine has 4 GPU(s)" in out
    assert out.endswith("FAIL: Ring-5 (ulysses_size=1, ring_size=5, tp_size=1 (product 5)) cannot run\n")


def test_named_devices_that_do_not_match_the_layout(examine):
    status, out = examine(with_gpus(4), "--tp", "4", "--devices", "0,1")
    assert status == 1
    assert "FAIL the devices '0,1' are 2 GPU(s), but the layout has 4 rank(s)" in out


def test_heads_that_do_not_divide(examine):
    status, out = examine(with_gpus(5), "--ulysses", "5")
    assert status == 1
    assert "48 attention heads, which do not divide by tp x ulysses = 5" in out


@pytest.mark.parametrize(
    ("machine", "arguments", "status", "said"),
    [
        (with_gpus(8), ["--ulysses", "4", "--tp", "2"], 0, "ok   FLUX.2-dev fits with Ulysses-4-TP-2"),
        (with_gpus(2, total=141), ["--ulysses", "2"], 0, "ok   FLUX.2-dev fits with Ulysses-2"),
        # A whole transformer and half a text encoder are more than 80 GiB; split over tp they are not.
        (with_gpus(2), ["--ulysses", "2"], 1, "-> TP-2, on 2 of these GPUs, would fit"),
        (with_gpus(2, total=24), ["--tp", "2"], 1, "-> TP-8, on 8 of these GPUs, would fit"),
        (with_gpus(2, total=12), ["--tp", "2"], 1, "-> use GPUs with more memory"),
        (with_gpus(2, free=40), ["--tp", "2"], 1, "-> end the other programs on these GPUs"),
    ],
    ids=["fits", "fits-h200", "needs-tp", "needs-more-gpus", "needs-larger-gpus", "busy"],
)
def test_memory_of_a_given_layout(examine, machine, arguments, status, said):
    got, out = examine(machine, *arguments)
    assert got == status
    assert said in out


def test_gpus_too_small_for_flux2_dev_are_only_a_warning_without_a_layout(examine):
    status, out = examine(with_gpus(2, total=24))
    assert status == 0
    assert "warn FLUX.2-dev does not fit: TP-2 needs 53.1 GiB per GPU" in out


def test_the_table_stops_at_the_number_of_gpus(examine):
    status, out = examine(with_gpus(4), "--json")
    assert status == 0
    fits = {row["name"]: row["fits"] for row in json.loads(out)["rows"]}
    assert fits == {
        "single": "no",
        "TP-2": "yes",
        "TP-4": "yes",
        "Ring-2": "no",
        "Ring-4": "yes",
        "Ulysses-2": "no",
        "Ulysses-4": "yes",
    }
    _, out = examine(with_gpus(4), "--json", "--devices", "2,3")
    assert {row["ranks"] for row in json.loads(out)["rows"]} == {1, 2}


def test_named_gpus_are_looked_at_in_the_order_of_ranks(examine):
    machine = with_gpus(3)
    machine = dataclasses.replace(machine, gpus=(dataclasses.replace(machine.gpus[0], free=GIB), *machine.gpus[1:]))
    assert examine(machine, "--tp", "2")[0] == 1
    assert examine(machine, "--tp", "2", "--devices", "cuda:2,1")[0] == 0


def test_a_machine_without_gpus_runs_on_the_cpu(examine):
    status, out = examine(CPU_ONLY)
    assert status == 0
    assert "FLUX.2-dev in bfloat16 (99 GiB) does not fit 24 GiB of memory" in out
    assert sum(line.endswith("no GPUs") for line in out.splitlines()) == 15


@pytest.mark.parametrize(("ring", "warned"), [(2, False), (3, True)])
def test_a_layout_on_the_cpu_warns_where_ranks_exceed_cores(examine, ring, warned):
    status, out = examine(CPU_ONLY, "--ring", str(ring))
    assert status == 0
    assert (f"warn {ring} ranks share 2 CPU core(s)" in out) == warned


def test_a_layout_that_the_demo_model_cannot_run_on_the_cpu(examine):
    status, out = examine(CPU_ONLY, "--ulysses", "3")  # 48 heads divide, the demo's 8 do not
    assert status == 1
    assert "has 8 attention heads" in out


def test_degrees_that_make_no_sense_are_refused(examine):
    with pytest.raises(ValueError, match="tp_size must be a whole number of at least 1"):
        examine(GOOD, "--tp", "0")


def test_json_holds_what_the_text_says(examine):
    machine = dataclasses.replace(with_gpus(8), links=(Link(0, 1, True, "NV18"),))
    status, out = examine(machine, "--json", "--ulysses", "2", "--tp", "4")
    report = json.loads(out)
    assert status == 0
    assert report["ok"] is True
    assert report["layout"] == ParallelismConfig(ulysses_size=2, tp_size=4).name
    assert report["machine"]["versions"] == GOOD.versions
    assert report["machine"]["links"] == [{"first": 0, "second": 1, "peer_access": True, "kind": "NV18"}]
    (row,) = report["rows"]
    parts = ("transformer", "text_encoder", "vae", "activations", "runtime")
    assert sum(row[part] for part in parts) == pytest.approx(row["total"], abs=0.05)
    assert {finding["level"] for finding in report["findings"]} == {"ok"}
    status, out = examine(machine, "--json", "--ulysses", "5")
    assert status == 1
    assert json.loads(out)["ok"] is False


def test_topology_of_nvidia_smi():
    text = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tNV18\tPXB\t0-47\t0\t\tN/A\n"
        "GPU1\tNV18\t X \tSYS\t48-95\t1\t\tN/A\n"
        "NIC0\tPXB\tSYS\t X \n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
    )
    assert parse_topology(text) == {0: {0: "X", 1: "NV18"}, 1: {0: "NV18", 1: "X"}}
    assert parse_topology("") == {}
    assert parse_topology("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") == {}


def test_no_nvidia_smi_is_no_failure(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine._nvidia_smi("topo", "-m") == ""


def test_it_says_what_auto_would_take_and_what_the_others_would_cost(examine):
    status, out = examine(with_gpus(8, total=48))
    assert status == 0
    assert re.search(r"ok   auto takes \S+ of 8 GPU\(s\): about [\d.]+ s a step", out)
    assert re.search(r"^  layout +step ms = compute \+ exchange", out, re.MULTILINE)
    assert re.search(r"^  TP-8 +\d+ +\d+ +\d+ \(0\) +18\.\d", out, re.MULTILINE)
    _, out = examine(with_gpus(8, total=48), "--json")
    report = json.loads(out)
    names = [option["layout"] for option in report["auto"]]
    assert {"TP-8", "Ulysses-4-TP-2", "Ring-8"} <= set(names)
    assert all(option["step_ms"] == option["compute_ms"] + option["exposed_ms"] for option in report["auto"])


def test_where_nothing_fits_there_is_no_choice(examine):
    _, out = examine(with_gpus(2, total=16), "--json")
    assert json.loads(out)["auto"] is None


@pytest.mark.parametrize(
    ("there", "level", "words"), [(True, "ok", "are read, with"), (False, "warn", "not installed")]
)
def test_quantized_files(monkeypatch, there, level, words):
    monkeypatch.setattr("parallel_backend.parallel.kitchen.has_kitchen", lambda: there)
    found = doctor.check_quantized()
    assert found.level == level
    assert "int8, nvfp4, mxfp8" in found.text
    assert words in found.text
    assert ("pip install comfy-kitchen" in found.remedy) == (not there)
