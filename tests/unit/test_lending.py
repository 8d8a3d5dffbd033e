"""Device memory that others ask for: the least that helps leaves, on this rank alone, and comes back as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel_backend import ParallelismConfig
from parallel_backend.limits import Memory
from parallel_backend.loading.adapters import AdapterSet, Patch
from parallel_backend.mesh import SINGLE
from parallel_backend.parallel.products import stored_tensors
from parallel_backend.runtime.rank import eviction
from parallel_backend.runtime.rank.component import Component, Place
from parallel_backend.runtime.rank.engine import Engine
from parallel_backend.runtime.rank.eviction import HOST_RESERVE, Eviction
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import write_text
from tests.watched_engine import watched_engine

HERE = [0]
"""The ranks of a process that is alone."""


class Device:
    """A device that is pretended: what its components and an allocator hold of it, and how much room the host has."""

    def __init__(self) -> None:
        self.size, self.host, self.kept = 10**12, 10**12, 0
        self.parts: list[Component] = []

    def weights(self) -> int:
        there = [part for part in self.parts if part.place is Place.DEVICE]
        return sum(part.nbytes - part.lent_bytes for part in there)

    def host_left(self) -> int:
        copies = [part.nbytes - part.uncopied_bytes for part in self.parts if part.host is not None]
        return self.host - sum(copies)

    def held(self) -> int:
        return self.weights() + self.kept

    def trim(self) -> None:
        self.kept = 0


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def engine(device, notices, monkeypatch) -> Engine:
    room = Eviction(
        torch.device("cpu"),
        SINGLE,
        notices.append,
        lambda: device.size - device.weights(),
        device.host_left,
        device.held,
        device.trim,
    )
    return watched_engine(room, device.parts, monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    text = write_text(folder / "t.safetensors", "fp32")
    tensors = flux2_tensors(heads=1, double=2, single=2)
    return [str(text), *(str(write(folder / f"{name}.safetensors", tensors)) for name in "ab")]


@pytest.fixture
def loaded(engine, files) -> Engine:
    """A text encoder ``t``, and two transformers ``a`` and ``b``, used in this order."""
    for path in files:
        engine.load(path[-len("t.safetensors")], path, ParallelismConfig(), torch.float32, lambda *_: None)
    for use in (encode, predict, lambda engine: predict(engine, "b")):
        use(engine)
    return engine


def encode(engine: Engine) -> Tensor:
    ids = torch.arange(1, 12)[None]
    return engine.encode_text("t", ids, torch.ones_like(ids))


def predict(engine: Engine, name: str = "a") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    engine.keep(name, {"context": torch.randn(1, 5, 192, generator=generator)}, [])
    x = torch.randn(1, 128, 2, 2, generator=generator)
    return engine.predict(name, x, torch.tensor([0.5]), "context", [], {"guidance": torch.tensor([4.0])})[0]


def part(engine: Engine, name: str) -> Component:
    return engine.models[name].components["text_encoder" if name == "t" else "transformer"]


def lent(engine: Engine) -> dict[str, int]:
    return {name: part(engine, name).lent_bytes for name in engine.models}


def largest(engine: Engine, name: str) -> int:
    return max(tensor.nbytes for tensor in stored_tensors(part(engine, name).module))


def test_what_the_allocator_keeps_is_enough(loaded, device):
    device.kept = 1000
    assert loaded.lend(1000, HERE) == (1000, device.weights(), {})
    assert lent(loaded) == {"t": 0, "a": 0, "b": 0}


def test_then_text_encoders_then_the_transformer_that_was_used_longest_ago(loaded, device):
    expected = [encode(loaded), predict(loaded), predict(loaded, "b")]
    sizes = {name: part(loaded, name).nbytes for name in "tab"}
    device.kept = 100
    freed, _, told = loaded.lend(100 + sizes["t"] // 3, HERE)
    assert set(told) == {"t"}
    assert told["t"]["text_encoder"] == freed - 100
    assert sizes["t"] // 3 <= freed - 100 < sizes["t"] // 3 + largest(loaded, "t")
    # More than all of it: the rest is of the transformer that was used first, and no more than is needed.
    wanted = sizes["t"] - told["t"]["text_encoder"] + sizes["a"] // 2
    freed, _, told = loaded.lend(wanted, HERE)
    assert set(told) == {"t", "a"}
    assert wanted <= freed < wanted + largest(loaded, "a")
    assert told["t"]["text_encoder"] == sizes["t"]
    assert [part(loaded, name).place for name in "tab"] == [Place.DEVICE] * 3
    assert all(
        torch.equal(*pair)
        for pair in zip((encode(loaded), predict(loaded), predict(loaded, "b")), expected, strict=True)
    )
    assert lent(loaded) == {"t": 0, "a": 0, "b": 0}


def test_what_nobody_uses_goes_first(loaded, device):
    loaded.residents.orphans = {"b"}
    _, _, told = loaded.lend(1, HERE)
    assert set(told) == {"b"}


def test_what_fits_again_is_copied_once(loaded, device):
    """Five pictures, each of which others ask something for: one copy to host memory, and the least comes back."""
    expected = predict(loaded)
    for name in "tb":
        loaded.unload(name)
    wanted = part(loaded, "a").nbytes // 3
    copies = []
    for _ in range(5):
        freed, _, told = loaded.lend(wanted, HERE)
        assert told["a"]["transformer"] == freed < part(loaded, "a").nbytes // 2
        copies.append({place: copy.data_ptr() for place, copy in part(loaded, "a").host.tensors.items()})
        assert torch.equal(predict(loaded), expected)
    assert copies == copies[:1] * 5
    assert sum(copy.nbytes for copy in part(loaded, "a").host.tensors.values()) == freed


def test_it_may_take_several_times(loaded, device):
    """A lent part can lend more, move to host memory as a whole, and be dropped."""
    expected = predict(loaded)
    loaded.unload("t")
    for leave in (Component.to_host, Component.drop):
        predict(loaded)
        predict(loaded, "b")
        loaded.lend(part(loaded, "a").nbytes, HERE)
        assert lent(loaded)["a"] == part(loaded, "a").nbytes
        loaded.lend(part(loaded, "b").nbytes // 2, HERE)
        assert 0 < lent(loaded)["b"] < part(loaded, "b").nbytes
        for name in "ab":
            leave(part(loaded, name))
        assert lent(loaded) == {"a": 0, "b": 0}
        loaded.residents.make_room_anew()
        assert torch.equal(predict(loaded), expected)
        assert torch.equal(predict(loaded, "b"), expected)


@pytest.mark.parametrize("room", [0, 3])
def test_where_the_host_has_no_room_less_is_given(loaded, device, room):
    tensors = sorted(tensor.nbytes for tensor in stored_tensors(part(loaded, "t").module))
    device.host = HOST_RESERVE + sum(tensors[:room])
    before = device.weights()
    freed, left, _ = loaded.lend(10**11, HERE)
    assert left == device.weights() > 0
    assert freed == before - left <= sum(tensors[:room])
    assert (freed > 0) == (room > 0)
    assert device.host_left() >= HOST_RESERVE


def test_other_ranks_give_nothing(loaded):
    assert loaded.lend(10**11, [1])[0::2] == (0, {})
    assert lent(loaded) == {"t": 0, "a": 0, "b": 0}


def test_on_the_cpu_there_is_nothing_to_give(files):
    engine = Engine(torch.device("cpu"), lambda _: None)
    engine.load("a", files[1], ParallelismConfig(), torch.float32, lambda *_: None)
    assert engine.lend(10**11, HERE)[0::2] == (0, {})
    assert part(engine, "a").lent_bytes == 0


def test_room_for_what_comes_back_is_made(loaded, device):
    """And for no more than that: who is in the way leaves, and where nothing helps the numbers are told."""
    loaded.unload("t")
    expected = predict(loaded)
    predict(loaded, "b")
    loaded.lend(part(loaded, "a").nbytes, HERE)
    device.size = 2 * part(loaded, "a").nbytes + part(loaded, "a").workspace(9)
    assert torch.equal(predict(loaded), expected)
    assert [part(loaded, name).place for name in "ab"] == [Place.DEVICE] * 2
    loaded.lend(part(loaded, "b").nbytes, HERE)
    device.size = part(loaded, "a").nbytes - 1
    with pytest.raises(ValueError, match=r"transformer of b.safetensors needs .* GiB on each device"):
        predict(loaded, "b")


def test_patches_are_kept_and_undone_to_the_bit(loaded):
    plain = predict(loaded)
    patches = {"double_blocks.0.img_attn.qkv.weight": [Patch("diff", (torch.ones(3 * 128, 128),), 0.1)]}
    whole = part(loaded, "a")
    whole.adapt(AdapterSet("set", patches))
    adapted = predict(loaded)
    assert not torch.equal(adapted, plain)
    for name in "tb":
        loaded.unload(name)
    loaded.lend(whole.nbytes, HERE)
    assert whole.lent_bytes > 0
    assert torch.equal(predict(loaded), adapted)
    loaded.lend(whole.nbytes, HERE)
    loaded.residents.bring("a", whole, 0)  # as the engine does before it takes other patches
    whole.adapt(AdapterSet("", {}))
    assert torch.equal(predict(loaded), plain)
    loaded.lend(whole.nbytes, HERE)  # of what it is now, not of what was copied before
    assert torch.equal(predict(loaded), plain)


@pytest.mark.parametrize("whole", [False, True], ids=["lent", "in host memory"])
def test_no_memory_in_the_middle_of_coming_back(loaded, monkeypatch, whole):
    expected = predict(loaded)
    transformer = part(loaded, "a")
    if whole:
        transformer.to_host()
    else:
        for name in "tb":
            loaded.unload(name)
        loaded.lend(transformer.nbytes, HERE)
    loaded.residents.make_room_anew()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", fails_after(3, torch.empty_like))
        with pytest.raises(torch.OutOfMemoryError):
            predict(loaded)
    loaded.recover(alone=False)
    assert torch.equal(predict(loaded), expected)
    assert transformer.lent_bytes == 0


def test_no_memory_in_the_middle_of_lending(loaded, monkeypatch):
    expected = predict(loaded)
    loaded.unload("t")
    with monkeypatch.context() as patch:
        patch.setattr("parallel_backend.runtime.rank.host_copy.torch.empty", fails_after(0, torch.empty))
        with pytest.raises(torch.OutOfMemoryError):
            loaded.lend(part(loaded, "a").nbytes, HERE)
    assert torch.equal(predict(loaded), expected)


def fails_after(calls: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """It runs out of memory from then on."""
    left = [calls]

    def call(*args, **options) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("none left")
        return function(*args, **options)

    return call


class TestHostMemory:
    """No more of it than the smallest limit around the process allows."""

    def test_what_cannot_move_is_dropped_and_read_again(self, loaded, device, notices, monkeypatch):
        expected = predict(loaded)
        limited = Memory(32 * 2**30, 2**30, "/sys/fs/cgroup/memory.max")
        monkeypatch.setattr(eviction, "memory", lambda: limited)
        device.host = HOST_RESERVE
        loaded.offload("a", "transformer")
        assert part(loaded, "a").place is Place.FILE
        (said,) = notices
        assert said.endswith(
            "unloaded as ComfyUI asked for memory; the next use reads it again (host memory has 2.0 GiB a rank left of "
            "the 32.0 GiB that /sys/fs/cgroup/memory.max allows, of which 2 stay free: not the 0.0 GiB that it takes)"
        )
        assert torch.equal(predict(loaded), expected)

    def test_patches_are_applied_again(self, loaded, device):
        patches = {"double_blocks.0.img_attn.qkv.weight": [Patch("diff", (torch.ones(3 * 128, 128),), 0.1)]}
        part(loaded, "a").adapt(AdapterSet("set", patches))
        adapted = predict(loaded)
        device.host = 0
        loaded.offload("a", "transformer")
        assert part(loaded, "a").place is Place.FILE
        assert torch.equal(predict(loaded), adapted)

    def test_what_has_room_moves(self, loaded, device):
        needed = part(loaded, "a").nbytes
        device.host = HOST_RESERVE + needed - 1
        assert not loaded.eviction.fits_host(part(loaded, "a"))
        device.host += 1
        loaded.offload("a", "transformer")
        assert part(loaded, "a").place is Place.HOST
        predict(loaded)
        device.host -= HOST_RESERVE  # the copy is there already
        loaded.offload("a", "transformer")
        assert part(loaded, "a").place is Place.HOST
