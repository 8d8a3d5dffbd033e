"""The fork server: what is forked from it is as if it had been started, and nothing outlives anything else."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import COMPONENTS, FAMILIES
from parallel_backend.planning.devices import Devices
from parallel_backend.runtime import forking
from parallel_backend.runtime.client import fork_server as client_side
from parallel_backend.runtime.client.groups import acquire_model, close_groups, find_model
from parallel_backend.runtime.client.launcher import Launcher
from parallel_backend.runtime.client.worker_group import WorkersFailedError
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.hosts import fork_server, torchrun

from .processes import Watched
from .test_group import CLIENT_ENVIRONMENT, evaluate, inputs, processes_of

pytestmark = pytest.mark.timeout(120)

OF_TESTS = "HYBRID_DIT_TEST_WORD"


@pytest.fixture(autouse=True)
def client_environment(monkeypatch) -> None:
    for name, value in CLIENT_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def revealed(monkeypatch, ranks: int = 1, devices: Devices = Devices("cpu"), imports=()) -> Iterator[list[dict]]:  # noqa: B008
    """What ranks find when they begin; they are there until the end of the context."""
    monkeypatch.setattr(torchrun, "WORKER", "tests.runtime.reveal")
    started = Launcher(ranks, devices)
    started.start(imports)
    try:
        files = [started.logs / f"found-{rank}.json" for rank in range(ranks)]
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert started.running(), started.explain(None)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield [json.loads(file.read_text()) for file in files]
    finally:
        started.stop(0.1)


@pytest.fixture
def config(pipeline) -> ModelConfig:
    return ModelConfig.create(pipeline, ParallelismConfig(), "cpu")


def test_orders_that_arrive_together():
    ours, theirs = socket.socketpair()
    orders = [forking.Order("module", ["x" * 100_000], {"number": str(number)}, ["torch"]) for number in range(3)]
    with ours, theirs, open(os.devnull) as nothing:
        thread = threading.Thread(target=lambda: [order.send(ours, [nothing.fileno()]) for order in orders])
        thread.start()
        for order in orders:
            received, descriptors = forking.Order.receive(theirs, 1)
            assert received == order
            assert os.readlink(f"/proc/self/fd/{descriptors[0]}") == os.devnull
            os.close(descriptors[0])
        thread.join()


def test_ranks_are_forks_that_have_nothing_of_others(monkeypatch):
    with revealed(monkeypatch, ranks=2) as found:
        for number, rank in enumerate(found):
            assert rank["forked"]
            assert rank["threads"] == 1
            assert not rank["cuda"]
            assert rank["imported"][0]
            assert rank["session"]  # torchrun ends it with all that it starts
            assert set(rank["signals"].values()) == {"0" * 16}
            assert rank["command"][1:] == ["-m", "tests.runtime.reveal", f"rank {number}"]
            # Nothing of the client, the fork server or the agent: an end of a socket would keep it from closing.
            links = rank["descriptors"]
            assert links.pop("0") == "/dev/null"
            assert {os.path.basename(links.pop(number)) for number in "12"} == {"torchrun.log"}
            assert not links
            environment = rank["environment"]
            for name, value in CLIENT_ENVIRONMENT.items():
                assert environment.get(name) != value, name
            assert not any("ALLOC_CONF" in name for name in environment)
            assert environment["RANK"] == environment["LOCAL_RANK"] == str(number)
            assert environment["WORLD_SIZE"] == "2"
            assert environment["CUDA_VISIBLE_DEVICES"] == ""
            assert environment["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 2))
            assert "OPENBLAS_NUM_THREADS" not in environment
        assert found[0]["agent"] == found[1]["agent"]


def test_groups_of_one_environment_share_it_and_no_variables(monkeypatch):
    with revealed(monkeypatch) as (first,):
        shared = client_side.fork_server_pid()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/of-torch")  # torch sets it, once it has been in use
        with revealed(monkeypatch, devices=Devices("cuda", ("3",))) as (second,):
            assert client_side.fork_server_pid() == shared
            assert first["agent"] != second["agent"]
            assert second["threads"] == 1
            assert second["environment"]["CUDA_VISIBLE_DEVICES"] == "3"
            assert "3" not in first["environment"]["CUDA_VISIBLE_DEVICES"]
        os.kill(first["pid"], 0)  # it does not end with another group


def test_the_agent_is_killed(config):
    model = acquire_model(config)
    with Watched(processes_of(model.group)) as watched:
        os.kill(model.group._launcher.process.pid, signal.SIGKILL)
        assert watched.alive_after(5) == []
    deadline = time.monotonic() + 5  # the fork server has to see the end and to say it
    while model.ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_group_that_is_given_up_meanwhile_leaves_it_alone(monkeypatch):
    with revealed(monkeypatch) as (first,):
        given_up = Launcher(1, Devices("cpu"))
        given_up.start(["tests.runtime.slow"])
        began = time.monotonic()
        given_up.stop(0.1)
        assert time.monotonic() - began < 1
        with revealed(monkeypatch):
            os.kill(first["pid"], 0)
            assert list(given_up.logs.iterdir()) == [given_up.logs / "torchrun.log"]


def test_it_is_killed(config):
    """At any moment it takes the group along, and the next use starts both afresh."""
    model = acquire_model(config)
    with Watched([*processes_of(model.group), client_side.fork_server_pid()]) as watched:
        os.kill(client_side.fork_server_pid(), signal.SIGKILL)
        assert watched.alive_after(5) == []
        with pytest.raises(WorkersFailedError, match="rank 0 ended"):
            evaluate(model, **inputs())
    assert find_model(config) is None

    def kill_it() -> None:
        if (pid := client_side.fork_server_pid()) is not None:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(WorkersFailedError, match=r"the workers did not start: the worker launcher ended, killed by"):
        acquire_model(config, check=kill_it)
    assert evaluate(acquire_model(config), **inputs()).shape


# --- last, as the fork server that other tests share is gone after them -----------------------------------------------


def test_a_library_that_asks_cuda_about_devices(monkeypatch):
    close_groups()
    monkeypatch.setenv(OF_TESTS, "asks")  # a fork server of its own
    with revealed(monkeypatch, imports=["tests.runtime.poisoned"]) as (rank,):
        assert not rank["forked"]
        assert rank["imported"] == [False, False]


def test_another_environment_and_a_library_with_threads(monkeypatch, tmp_path):
    """A variable may be read by imports: groups that have another value of it have another fork server."""
    monkeypatch.delenv(OF_TESTS, raising=False)
    close_groups()  # of tests before
    # A package that libraries import where it is there, and that no rank needs, is none to them.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for package in fork_server.UNNEEDED:
        (tmp_path / f"{package}.py").write_text("from tests.runtime import threaded\n")
    (tmp_path / "wanting.py").write_text(
        "from transformers.utils import is_peft_available\nassert not is_peft_available()\nimport peft\n"
    )
    with contextlib.ExitStack() as both:
        with revealed(monkeypatch, imports=["wanting"]) as (first,):
            assert first["forked"]
            earlier = both.enter_context(Watched([client_side.fork_server_pid()]))
            monkeypatch.setenv(OF_TESTS, "another")
            with revealed(monkeypatch, imports=["tests.runtime.threaded"]) as (second,):
                assert client_side.fork_server_pid() not in earlier.descriptors
                assert second["environment"][OF_TESTS] == "another"
                assert OF_TESTS not in first["environment"]
                # What has threads is not forked from: the rank was started, and has imported nothing yet.
                assert not second["forked"]
                assert second["imported"] == [False, False]
                assert earlier.alive_after(0)  # it has a group
                os.kill(first["pid"], 0)
        assert earlier.alive_after(5) == []


def test_it_ends_when_nobody_wants_anything_of_it(monkeypatch):
    monkeypatch.setattr(fork_server, "IDLE_SECONDS", 0.2)
    control, _client = socket.socketpair()
    began = time.monotonic()
    fork_server.ForkServer(control).serve()
    assert 0.2 < time.monotonic() - began < 2


@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_it_ends_with_its_client_while_it_imports(tmp_path, seconds):
    with (tmp_path / "log").open("wb") as log:
        process = client_side.ForkServerProcess(torchrun.client_environment(), log.fileno())
    time.sleep(seconds)
    assert process.process.poll() is None
    process.close()  # as when the client is killed
    try:
        assert process.process.wait(3) in (0, 1)
    except subprocess.TimeoutExpired:
        process.process.kill()
        raise


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_components_take_can_be_imported(family):
    """A name that is wrong would have each rank import for itself, and nobody would notice."""
    assert family.imports("transformer")
    for module in (module for component in COMPONENTS for module in family.imports(component)):
        importlib.import_module(module)
    # A transformer alone does not wait for a text encoder's classes.
    assert not any(module.startswith("transformers.") for module in family.imports("transformer"))
