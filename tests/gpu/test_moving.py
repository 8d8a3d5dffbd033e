"""Weights that leave the GPU for page-locked host memory: they come back as they were, and the GPU's memory is free."""

from __future__ import annotations

import logging

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.mesh import SINGLE
from parallel_backend.parallel.products import stored_tensors
from parallel_backend.runtime.rank.component import Place
from parallel_backend.runtime.rank.engine import Engine
from parallel_backend.runtime.rank.eviction import Eviction
from parallel_backend.runtime.rank.host_copy import HostCopy
from tests.single_file import flux2_tensors, to_fp8, write
from tests.text_encoder_file import write_text

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def engine(notices) -> Engine:
    return Engine(CUDA, notices.append)


def load(engine: Engine, path, **options) -> None:
    engine.load(path.stem, str(path), ParallelismConfig(), torch.bfloat16, lambda *_: None, **options)


def predict(engine: Engine, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    engine.keep(name, {"context": torch.randn(1, 64, 192, generator=generator)}, [])
    x = torch.randn(1, 128, 32, 32, generator=generator)
    return engine.predict(name, x, torch.tensor([0.5]), "context", [], {"guidance": torch.tensor([4.0])})[0]


def encode(engine: Engine, name: str) -> torch.Tensor:
    ids = torch.arange(1, 60)[None]
    return engine.encode_text(name, ids, torch.ones_like(ids))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_transformer_leaves_and_comes_back(engine, notices, tmp_path, kind):
    tensors, metadata = flux2_tensors(heads=12, double=2, single=8), {}
    if kind == "fp8":
        tensors, metadata = to_fp8(tensors, "metadata")
    before = torch.cuda.memory_allocated()
    path = write(tmp_path / "large.safetensors", tensors, metadata=metadata)
    load(engine, path, fp8="stored")
    part = engine.models["large"].components["transformer"]
    expected = predict(engine, "large")
    held = torch.cuda.memory_allocated() - before
    assert held >= part.nbytes > 2**28
    for _ in range(2):
        engine.offload("large", "transformer")
        assert part.place is Place.HOST
        assert torch.cuda.memory_allocated() - before < 0.05 * held
        assert all(p.is_pinned() for p in stored_tensors(part.module))
        assert torch.equal(predict(engine, "large"), expected)
        assert part.place is Place.DEVICE
    assert len(notices) == 2
    assert "moved to host memory as ComfyUI asked for memory" in notices[0]
    engine.unload("large")
    assert torch.cuda.memory_allocated() - before < 0.05 * held


def test_the_next_model_makes_room(notices, tmp_path):
    """The device is said to be small: the first model moves to host memory, and back when it is used."""
    paths = [write(tmp_path / f"{name}.safetensors", flux2_tensors(heads=8, double=1, single=4)) for name in "ab"]
    base = torch.cuda.memory_allocated()
    size = 10**15
    room = Eviction(CUDA, SINGLE, notices.append, lambda: size - (torch.cuda.memory_allocated() - base))
    engine = Engine(CUDA, notices.append, room)
    load(engine, paths[0])
    expected = predict(engine, "a")
    size = int(1.6 * engine.models["a"].components["transformer"].nbytes)
    load(engine, paths[1])
    assert engine.models["a"].components["transformer"].place is Place.HOST
    predict(engine, "b")
    assert torch.equal(predict(engine, "a"), expected)
    assert engine.models["b"].components["transformer"].place is Place.HOST


@pytest.mark.parametrize("memory", ["host", "device", "auto"])
def test_where_a_text_encoder_stays(engine, tmp_path, memory):
    load(engine, write_text(tmp_path / "text.safetensors", "bf16"), encoder_memory=memory)
    first = encode(engine, "text")
    place = engine.models["text"].components["text_encoder"].place
    assert place is (Place.HOST if memory == "host" else Place.DEVICE)  # a GPU of the size of one has room
    assert torch.equal(encode(engine, "text"), first)


def test_auto_lets_a_text_encoder_go_where_little_stays_free(notices, tmp_path):
    room = Eviction(CUDA, SINGLE, notices.append, lambda: 2**30)
    engine = Engine(CUDA, notices.append, room)
    load(engine, write_text(tmp_path / "text.safetensors", "bf16"))
    first = encode(engine, "text")
    assert engine.models["text"].components["text_encoder"].place is Place.HOST
    assert torch.equal(encode(engine, "text"), first)


def test_a_copy_takes_what_it_copies_and_no_more(caplog):
    tensors = [torch.randn(n, device=CUDA) for n in (3, 100_000, 1)] + [torch.empty(0, device=CUDA)]
    with caplog.at_level(logging.WARNING):
        copy = HostCopy(tensors)
    assert not caplog.records
    assert all(torch.equal(a, b.cpu()) for a, b in zip(copy.tensors, tensors, strict=True))
    assert copy.tensors[1].is_pinned()
    seen = copy.tensors[1].untyped_storage().nbytes()
    assert seen < 400_000 + 4 * 256 + 100
