"""ComfyUI takes memory from real ranks while a step is cancelled, while somebody interrupts, and while a rank ends.

The ranks are on the CPU and believe in a device each (`pretended_device`).
"""

from __future__ import annotations

import _thread
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.families import Conditioning
from parallel_backend.planning.devices import Devices
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.client.worker_group import WorkersFailedError
from parallel_backend.runtime.group_config import ModelConfig
from tests.faults import injection
from tests.faults.injection import Order, Orders

from . import pretended_device

pytestmark = pytest.mark.timeout(180)

GPUS = ("0", "1")
DEADLINE = 15.0
"""Seconds of a step, and of a rank that is stopped."""
SLEEP, REST = 20.0, 0.5
"""How long a rank would take, and from when on it is let."""


class Cancelled(Exception):  # noqa: N818
    """As ComfyUI's InterruptProcessingException: an Exception of its own."""


@pytest.fixture(scope="module")
def orders(tmp_path_factory) -> Iterator[Orders]:
    """Where faults are ordered; the environment of the ranks has the hooks for them."""
    folder = tmp_path_factory.mktemp("hooks")
    hooks = (Path(pretended_device.__file__), Path(injection.__file__))
    (folder / "sitecustomize.py").write_text(
        "import runpy\n" + "".join(f"runpy.run_path({str(path)!r}, run_name='hooks')['install']()\n" for path in hooks)
    )
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), before] if before else [str(folder)]))
        patch.setenv("HYBRID_DIT_STEP_DEADLINE", str(DEADLINE))
        patch.setenv(injection.FOLDER, str(folder / "orders"))
        yield Orders(folder / "orders")
        close_groups()


@pytest.fixture(scope="module")
def config(pipeline) -> ModelConfig:
    made = ModelConfig.create(pipeline, ParallelismConfig(ulysses_size=2), "cpu")
    return dataclasses.replace(made, devices=Devices("cpu", GPUS))


@pytest.fixture
def model(orders, config) -> Iterator[RemoteModel]:
    yield acquire_model(config)
    orders.withdraw()


@pytest.fixture(scope="module")
def expected(orders, config) -> torch.Tensor:
    return predict(acquire_model(config))


def predict(model: RemoteModel, check: Callable[[], None] = lambda: None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((1, 128, 4, 6), (1, 7, 192)))
    guidance = {"guidance": torch.tensor([4.0])}
    return model.predict(x, torch.tensor([0.5]), Conditioning(context, (), guidance), check)


def lend(model: RemoteModel, gpu: str = "0") -> int:
    """All that a rank has; the bytes that it gave."""
    freed, left = model.group.lend(2**40, gpu)
    assert left == 0
    return freed


def soon(work: Callable[[], object], orders: Orders) -> threading.Thread:
    """Does something once an order is being carried out, and has the rank go on a little later."""

    def run() -> None:
        deadline = time.monotonic() + 60
        while orders.carried_out() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        work()
        threading.Timer(REST, orders.withdraw).start()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_what_was_lent_comes_back_with_the_next_step(model, expected):
    pids = dict(model.group._pids)
    freed = lend(model)
    assert freed > 0
    assert model.lent["transformer"] > 0
    assert torch.equal(predict(model), expected)
    assert "transformer" not in model.lent
    others = sum(model.lent.values())  # nobody has used those since
    assert lend(model) == freed - others
    assert torch.equal(predict(model), expected)
    assert model.group._pids == pids


def test_memory_is_asked_for_behind_a_step_that_was_cancelled(model, orders, expected):
    """The step in flight ends first; the next prompt has the same ranks, and what they lent."""
    pids, pressed = dict(model.group._pids), threading.Event()
    orders.give(Order(1, "predict", "sleep", seconds=SLEEP))

    def check() -> None:
        if pressed.is_set():
            raise Cancelled

    cancelling = soon(pressed.set, orders)
    with pytest.raises(Cancelled):
        predict(model, check)
    cancelling.join()
    assert lend(model) > 0
    assert torch.equal(predict(model), expected)
    assert model.group._pids == pids


def test_cancel_while_memory_is_lent(model, orders, expected):
    """ComfyUI hears of it when it has the memory, and the prompt ends there; the next one is right."""
    pids, pressed = dict(model.group._pids), threading.Event()
    orders.give(Order(0, "lend", "sleep", seconds=SLEEP))

    def check() -> None:
        if pressed.is_set():
            raise Cancelled

    cancelling = soon(pressed.set, orders)
    assert lend(model) > 0
    cancelling.join()
    with pytest.raises(Cancelled):
        predict(model, check)
    assert torch.equal(predict(model), expected)
    assert model.group._pids == pids


def test_ctrl_c_while_memory_is_lent(model, orders, expected):
    """Nobody waits for the answer; the ranks have lent the memory all the same, and bring it back."""
    pids = dict(model.group._pids)
    orders.give(Order(0, "lend", "sleep", seconds=SLEEP))
    interrupting = soon(_thread.interrupt_main, orders)
    with pytest.raises(KeyboardInterrupt):
        lend(model)
    interrupting.join()
    assert model.lent["transformer"] > 0, "ComfyUI would not make room for what comes back"
    assert torch.equal(predict(model), expected)
    assert "transformer" not in model.lent
    assert model.group._pids == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_while_memory_is_lent(model, config, orders, expected, rank):
    """Whose memory it is does not matter: the group ends, its memory is free, and the next prompt has a fresh one."""
    orders.give(Order(rank, "lend", "kill"))
    with pytest.raises(WorkersFailedError, match=rf"rank {rank} ended, killed by signal 9"):
        lend(model)
    assert model.group.lend(1, "0") == (0, 0)
    assert torch.equal(predict(acquire_model(config)), expected)


@pytest.mark.thorough
def test_a_rank_hangs_while_memory_is_lent(model, config, orders, expected):
    orders.give(Order(1, "lend", "stop"))
    began = time.monotonic()
    with pytest.raises(WorkersFailedError, match=r"rank 1 is stopped \(SIGSTOP\)"):
        lend(model)
    assert time.monotonic() - began < DEADLINE + 5
    assert torch.equal(predict(acquire_model(config)), expected)
