"""How blocks run is what was asked for, in the ranks too, and changes nothing but the order of sums."""

from __future__ import annotations

import logging
from dataclasses import asdict

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.config import Speed
from parallel_backend.families import Conditioning
from parallel_backend.runtime import group_config
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.group_config import ModelConfig
from tests.errors import relative_error

pytestmark = pytest.mark.timeout(300)

LAYOUT = ParallelismConfig(ulysses_size=2)
EVERYTHING = Speed(compile=True, cuda_graphs=True, copy_engines=True)
EXACT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def no_groups_left():
    yield
    close_groups()


def predictions(config: ModelConfig) -> list[torch.Tensor]:
    """For two sizes, the first of them again at the end."""
    model = acquire_model(config)
    made = []
    for number, side in enumerate((8, 11, 8)):
        generator = torch.Generator().manual_seed(side)
        x, context = (torch.randn(1, *shape, generator=generator) for shape in ((128, side, side), (40, 192)))
        conditioning = Conditioning(context, tensors={"guidance": torch.tensor([4.0])})
        made.append(model.predict(x, torch.tensor([0.5 - 0.1 * number]), conditioning))
    return made


@pytest.mark.parametrize(
    ("layout", "speed"),
    [
        (ParallelismConfig(), Speed(compile=True, cuda_graphs=True)),
        (LAYOUT, Speed(copy_engines=True)),
        pytest.param(LAYOUT, EVERYTHING, marks=pytest.mark.thorough),
    ],
    ids=["compiled", "copies", "everything at once"],
)
def test_what_is_asked_for(pipeline, caplog, layout, speed):
    if speed.copy_engines:
        close_groups()  # one that has ranks exchange so says once that they cannot
    plain = ModelConfig.create(pipeline, layout, "cpu")
    fast = ModelConfig.create(pipeline, layout, "cpu", speed=speed)
    assert plain != fast
    assert plain.group == fast.group
    expected = predictions(plain)
    with caplog.at_level(logging.INFO):
        found = predictions(fast)
    note = "ranks exchange without copy engines, since the ranks are on CPUs"
    assert (note in caplog.text) == speed.copy_engines
    for prediction, wanted in zip(found, expected, strict=True):
        assert relative_error(prediction, wanted) <= EXACT
        # Where it is compiled, sums are taken in another order; were it not, nothing would differ.
        assert torch.equal(prediction, wanted) == (not speed.compile)
    assert acquire_model(fast).report()["speed"] == asdict(speed)


def test_a_prediction_stays_what_it_was(pipeline):
    """The next one comes in the same shared memory."""
    config = ModelConfig.create(pipeline, LAYOUT, "cpu")
    first, second, _ = predictions(config)
    again = predictions(config)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_compile_without_a_compiler_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr(group_config, "missing_build_tools", lambda: "a C compiler (such as the package gcc)")
    with pytest.raises(ValueError, match=r"compile needs a C compiler .* or set compile to false"):
        ModelConfig.create(pipeline, LAYOUT, "cpu", speed=Speed(compile=True))
    assert ModelConfig.create(pipeline, LAYOUT, "cpu").speed == Speed()
