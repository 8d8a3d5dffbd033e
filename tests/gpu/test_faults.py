"""Faults on GPUs, over NCCL where there are two: quickly found and told, the memory free, and the next run works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel_backend import ParallelismConfig
from parallel_backend.config import Speed
from parallel_backend.families import Conditioning
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.errors import OutOfMemoryError, WorkersFailedError
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.patience import STEP_VARIABLE as VARIABLE
from tests.tiny_pipeline import make_tiny_pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

FAIL_SECONDS = 5.0
LAYOUTS = {
    "Ulysses-2": ParallelismConfig(ulysses_size=2),
    "Ring-2": ParallelismConfig(ring_size=2),
    "TP-2": ParallelismConfig(tp_size=2),
}
EXCHANGES = {"NCCL": Speed(), "copy engines": Speed(copy_engines=True)}
LEFT_BYTES = 64 * 2**20
"""What a GPU's free memory may differ by; a rank's CUDA context alone takes some 500 MiB."""


class Cancelled(Exception):  # noqa: N818
    """As ComfyUI's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _no_groups():
    yield
    close_groups()


def free() -> list[int]:
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def step(model: RemoteModel, side: int = 16, check: Callable[[], None] = lambda: None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(1, *shape, generator=generator) for shape in ((128, side, side), (64, 192)))
    conditioning = Conditioning(context, tensors={"guidance": torch.tensor([4.0])})
    return model.predict(x, torch.tensor([0.5]), conditioning, check=check)


def assert_memory_is_free(before: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(was - now > LEFT_BYTES for was, now in zip(before, free(), strict=True)):
        assert time.monotonic() < deadline, (before, free())
        time.sleep(0.1)


def assert_next_run_works(config: ModelConfig, expected: Tensor) -> None:
    assert torch.equal(step(acquire_model(config)), expected)


@two_gpus
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_in_a_collective(folder, layout, exchange):
    before = free()
    config = ModelConfig.create(folder, LAYOUTS[layout], "0,1", speed=EXCHANGES[exchange])
    model = acquire_model(config)
    expected = step(model)
    os.kill(model.group._pids[0], signal.SIGSTOP)  # so that rank 1 waits for it in a collective
    killed: list[float] = []
    waits = iter(range(1000))

    def check() -> None:
        if not killed and next(waits) == 10:
            os.kill(model.group._pids[0], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(WorkersFailedError, match=r"rank 0 ended, killed by signal 9 \(SIGKILL\)"):
        step(model, check=check)
    took = time.monotonic() - killed[0]
    print(f"{layout}, {exchange}: killed in a collective, told after {took:.2f} s")
    assert took < FAIL_SECONDS
    assert_memory_is_free(before)
    assert_next_run_works(config, expected)


@two_gpus
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_stopped(folder, monkeypatch, exchange):
    monkeypatch.setenv(VARIABLE, "3")
    before = free()
    config = ModelConfig.create(folder, LAYOUTS["Ulysses-2"], "0,1", speed=EXCHANGES[exchange])
    model = acquire_model(config)
    expected = step(model)
    step(model)
    os.kill(model.group._pids[1], signal.SIGSTOP)
    with pytest.raises(WorkersFailedError, match=r"rank 1 is stopped \(SIGSTOP\)"):
        step(model)
    assert_memory_is_free(before)
    assert_next_run_works(config, expected)


@two_gpus
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_out_of_memory_on_one_rank(folder, exchange):
    config = ModelConfig.create(folder, LAYOUTS["Ulysses-2"], "0,1", speed=EXCHANGES[exchange])
    model = acquire_model(config)
    expected = step(model)
    before = free()
    taken = torch.empty(free()[1] - 200 * 2**20, dtype=torch.uint8, device="cuda:1")
    began = time.monotonic()
    with pytest.raises(OutOfMemoryError, match=r"(?s)rank 1 ran out of memory: it asked for \d.*What would help"):
        step(model, side=256)
    print(f"out of memory on rank 1, told after {time.monotonic() - began:.2f} s")
    del taken
    torch.cuda.empty_cache()
    assert_memory_is_free(before)
    assert_next_run_works(config, expected)


def test_out_of_memory_alone_loads_nothing_again(folder):
    config = ModelConfig.create(folder, ParallelismConfig(), "0")
    model = acquire_model(config)
    expected = step(model)
    taken = torch.empty(free()[0] - 200 * 2**20, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(OutOfMemoryError, match="rank 0 ran out of memory"):
        step(model, side=256)
    del taken
    torch.cuda.empty_cache()
    assert acquire_model(config) is model
    assert torch.equal(step(model), expected)


@two_gpus
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_cancel_in_a_step(folder, exchange):
    config = ModelConfig.create(folder, LAYOUTS["Ulysses-2"], "0,1", speed=EXCHANGES[exchange])
    model = acquire_model(config)
    expected = step(model)
    stopped = model.group._pids[1]
    os.kill(stopped, signal.SIGSTOP)
    waits = iter(range(1000))

    def check() -> None:
        if next(waits) == 5:
            raise Cancelled

    began = time.monotonic()
    with pytest.raises(Cancelled):
        step(model, check=check)
    took = time.monotonic() - began
    os.kill(stopped, signal.SIGCONT)
    print(f"cancelled, told after {took - 5 * 0.05:.2f} s")
    assert took - 5 * 0.05 < 0.2
    assert acquire_model(config) is model
    assert torch.equal(step(model), expected)
