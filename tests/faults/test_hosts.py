"""A group over two hosts, which are network namespaces: it computes what one host would, and gets over what happens."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file

from parallel_backend.config import ParallelismConfig
from parallel_backend.loading.adapters import AdapterSet, Patch
from parallel_backend.runtime.client import other_hosts
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.client.worker_group import WorkersFailedError
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.host_address import Hosts
from tests.runtime.processes import Watched
from tests.runtime.test_group import TOLERANCE, evaluate, expected_prediction, inputs, relative_error
from tests.tiny_pipeline import make_tiny_pipeline

from .two_hosts import FIRST, HOSTS, KEEPER, OTHER, OTHER_NAME, RANK, ROOT, NotPermittedError, TwoHosts, Worker

pytestmark = pytest.mark.timeout(180)

LOST_SECONDS = 12.0
"""From cutting a host off to the error: it counts as lost after 10 s."""
DIED_SECONDS = 5.0
GONE_SECONDS = 10.0
LARGE = {"height": 56, "width": 56}
"""A latent whose evaluation takes seconds, so that something can happen in the middle of it."""
OTHER_RANKS = f"host 1 ({OTHER_NAME}, {OTHER}; rank 1)"


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        hosts = TwoHosts()
    except NotPermittedError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        with hosts.on_first():
            yield hosts
            close_groups()
    finally:
        hosts.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of pipelines: ``tiny``, ``missing`` on the other host, and ``other``, which has other weights there."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_pipeline(folder / "tiny")
    shutil.copytree(folder / "tiny", folder / "missing")
    shutil.copytree(folder / "tiny", folder / "other")
    shutil.copytree(folder / "tiny", folder / "trained")
    file = folder / "trained" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    return folder


@pytest.fixture(scope="module")
def worker(hosts: TwoHosts, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The other host, which is never touched."""
    home = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_DIT_HOME", str(tmp_path_factory.mktemp("first")))
        replaced = {folder / "other": folder / "trained"}
        with Worker(hosts, home / "worker.txt", home, (folder / "missing",), replaced) as worker:
            yield worker
            close_groups()


@pytest.fixture(scope="module")
def untouched(folder: Path) -> Flux2Pipeline:
    """The oracle: diffusers on one host."""
    pipe = Flux2Pipeline.from_pretrained(folder / "tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config_of(folder: Path, layout: ParallelismConfig) -> ModelConfig:
    return ModelConfig.create(folder, layout, "cpu", hosts=HOSTS)


@pytest.fixture
def model(worker: Worker, folder: Path) -> RemoteModel:
    """A rank on each host."""
    return acquire_model(config_of(folder / "tiny", ParallelismConfig(ulysses_size=2)))


def assert_equals_one_host(model: RemoteModel, untouched: Flux2Pipeline, seed: int) -> None:
    given = inputs(seed=seed)
    assert relative_error(evaluate(model, **given), expected_prediction(untouched, **given)) <= TOLERANCE


def error_in_a_step(model: RemoteModel, happening) -> tuple[str, float]:
    """What an evaluation ends with in the middle of which something happens, and so many seconds after it."""
    evaluate(model, **inputs(**LARGE))
    began = time.monotonic()
    evaluate(model, **inputs(**LARGE))
    middle = (time.monotonic() - began) / 3
    print(f"a step takes {3 * middle:.2f} s")
    happened = []

    def happen() -> None:
        happened.append(time.monotonic())
        happening()

    timer = threading.Timer(middle, happen)
    timer.start()
    with pytest.raises(WorkersFailedError) as error:
        evaluate(model, **inputs(**LARGE))
    seconds = time.monotonic() - happened[0]
    print(f"{seconds:.2f} s later: {error.value}")
    timer.join()
    return str(error.value), seconds


def test_two_hosts_compute_what_one_does(model, untouched, hosts, worker):
    assert_equals_one_host(model, untouched, seed=1)
    given = inputs(seed=2)
    references = [torch.randn(1, 128, 3, 5)]
    actual = evaluate(model, **given, references=references)
    assert relative_error(actual, expected_prediction(untouched, **given, references=references)) <= TOLERANCE
    assert len(hosts.processes(RANK)) == 1
    assert [rank["host"] for rank in model.report()["ranks"]] == [os.uname().nodename, OTHER_NAME]
    assert "joined a group of 2 ranks: rank 1 on the CPU" in worker.said()


def test_a_lora(model, untouched):
    """It reaches the ranks of both hosts, its strength too, and is off again to the bit."""
    given, key = inputs(seed=3), "double_blocks.0.img_attn.proj.weight"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(128, 4, generator=generator), torch.randn(4, 128, generator=generator)
    before = evaluate(model, **given)
    weight = untouched.transformer.transformer_blocks[0].attn.to_out[0].weight
    clean = weight.detach().clone()
    for strength in (0.1, -0.3):
        adapters = AdapterSet(f"lora {strength}", {key: [Patch("lora", (up, down), strength)]})
        with torch.no_grad():
            weight.copy_(clean + strength * up @ down)
            expected = expected_prediction(untouched, **given)
            weight.copy_(clean)
        assert relative_error(evaluate(model, **given, adapters=adapters), expected) <= TOLERANCE
        assert relative_error(expected, before) > 100 * TOLERANCE
    assert torch.equal(evaluate(model, **given), before)


@pytest.mark.parametrize(("name", "what"), [("missing", "is not a"), ("other", "is another checkpoint")])
def test_checkpoint_that_the_other_host_does_not_have(name, what, model, folder, untouched):
    with pytest.raises(ValueError, match=f"on the host {OTHER_NAME}") as error:
        acquire_model(config_of(folder / name, ParallelismConfig(ulysses_size=2)))
    assert str(folder / name) in str(error.value)
    assert what in str(error.value)
    assert model.ready
    assert_equals_one_host(model, untouched, seed=3)


def test_host_cut_off_in_a_step(model, hosts, worker, folder, untouched):
    said = len(worker.said())
    try:
        with Watched(hosts.processes(RANK) + hosts.processes(KEEPER)) as watched:
            alive = []

            def cut() -> None:
                hosts.cut()
                alive.extend(watched.alive_after(GONE_SECONDS))

            text, seconds = error_in_a_step(model, cut)
            assert f"{OTHER_RANKS} has not been heard of for 10 s" in text
            assert seconds < LOST_SECONDS
            assert not alive
        assert "has not answered for 8 s; the ranks here were stopped" in worker.said()[said:]
    finally:
        hosts.mend()
    assert_equals_one_host(acquire_model(model.config), untouched, seed=4)


def test_rank_killed_on_the_other_host(model, hosts, worker, untouched):
    (rank,) = hosts.processes(RANK)
    text, seconds = error_in_a_step(model, lambda: os.kill(rank, signal.SIGKILL))
    assert f"{OTHER_RANKS}: rank 1 ended, killed by signal 9 (SIGKILL)" in text
    (log,) = re.findall(r"the end of its log \((\S+)\)", text)
    assert "rank 1 on cpu" in Path(log).read_text()  # the hosts here share their files
    assert seconds < DIED_SECONDS


@pytest.mark.thorough
def test_client_killed(hosts, worker, folder, tmp_path):
    close_groups()
    said = len(worker.said())
    out = (tmp_path / "out.txt").open("w+")
    command = [
        *(sys.executable, "-m", "parallel_backend", "generate", "--model", str(folder / "tiny"), "--devices", "cpu"),
        *("--prompt", "a red circle", "--width", "256", "--height", "256", "--steps", "500", "--ulysses", "2"),
        *("--nnodes", "2", "--rdzv-endpoint", HOSTS.endpoint, "--out", str(tmp_path / "out.png")),
    ]
    client = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out)
    try:
        worker.wait_for(" up\n", 120, said)
        with Watched(hosts.processes(RANK)) as watched:
            client.kill()
            assert not watched.alive_after(GONE_SECONDS)
    finally:
        client.kill()
        client.wait()
    worker.wait_for("the first host has ended the group", 5, said)
    out.seek(0)
    assert "wrote" not in out.read()


def test_another_layout_and_a_rank_that_ends_between_prompts(worker, folder, untouched, hosts):
    """After groups that ended in each of the ways above."""
    model = acquire_model(config_of(folder / "tiny", ParallelismConfig(ulysses_size=2, tp_size=2)))
    assert_equals_one_host(model, untouched, seed=5)
    assert len(hosts.processes(RANK)) == 2
    assert "joined a group of 4 ranks: ranks 2 to 3 on the CPU" in worker.said()
    # A rank there ends while nobody waits for it: nobody gets an error, and the next use starts a fresh group.
    with Watched(hosts.processes(RANK)) as watched:
        os.kill(hosts.processes(RANK)[0], signal.SIGKILL)
        assert not watched.alive_after(GONE_SECONDS)
    deadline = time.monotonic() + DIED_SECONDS
    while model.ready:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    close_groups()


@pytest.mark.thorough
def test_host_that_cannot_take_part(hosts, folder, tmp_path, monkeypatch):
    close_groups()
    monkeypatch.setenv("HYBRID_DIT_HOME", str(tmp_path))
    group = Hosts(2, f"{FIRST}:29518")
    config = ModelConfig.create(folder / "tiny", ParallelismConfig(ulysses_size=2), "cpu", hosts=group)
    with Worker(hosts, tmp_path / "worker.txt", tmp_path, group=group, arguments=("--nproc-per-node=2",)) as worker:
        with pytest.raises(WorkersFailedError) as error:
            acquire_model(config)
        words = "the layout has 2 ranks, 1 on each of 2 hosts, but --nproc-per-node is 2 here"
        assert f"{OTHER_RANKS} cannot take part: {words}" in str(error.value)
        worker.wait_for(f"this host cannot take part in the group: {words}", 5)


def test_host_that_never_joins(hosts, folder, monkeypatch, tmp_path):
    """The node says what to run where, and Cancel works."""
    close_groups()
    monkeypatch.setenv("HYBRID_DIT_HOME", str(tmp_path))
    group = Hosts(2, f"{FIRST}:29519")
    config = ModelConfig.create(folder / "tiny", ParallelismConfig(ulysses_size=2), "cpu", hosts=group)
    told = []

    def cancel() -> None:
        if told:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acquire_model(config, lambda *state: told.append(state), cancel)
    command = f"python -m parallel_backend worker --nnodes 2 --rdzv-endpoint {group.endpoint}"
    assert told[0] == ("starting", 0, 2, f"waiting for host 1: run there: {command}")
    monkeypatch.setattr(other_hosts, "JOIN_SECONDS", 0.5)
    with pytest.raises(WorkersFailedError, match="after 0 s still waiting for host 1: run there: python -m"):
        acquire_model(config)
