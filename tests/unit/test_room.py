"""What leaves a full device so that the next part fits: in one process, with a device that is said to be small."""

from __future__ import annotations

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.mesh import SINGLE
from parallel_backend.runtime.engine import Engine
from parallel_backend.runtime.errors import BatchTooLargeError
from parallel_backend.runtime.parts import Part, Place
from parallel_backend.runtime.room import Room
from tests.errors import relative_error
from tests.single_file import flux2_tensors, to_fp8, write

MIB = 2**20


class SmallDevice:
    """Memory of a device that holds what the parts on it take, and no more than its size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[Part] = []

    def available(self) -> int:
        return self.size - sum(part.nbytes for part in self.parts if part.place is Place.DEVICE)


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def device() -> SmallDevice:
    return SmallDevice(10**12)


@pytest.fixture
def engine(device, notices, monkeypatch) -> Engine:
    room = Room(torch.device("cpu"), SINGLE, notices.append, device.available, lambda: 10**12)
    engine = Engine(torch.device("cpu"), notices.append, room)
    build = engine._build

    def watched(*args):
        model = build(*args)
        device.parts += model.parts.values()
        return model

    monkeypatch.setattr(engine, "_build", watched)
    return engine


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    tensors = flux2_tensors(heads=1, double=1, single=1)
    return [str(write(folder / f"{name}.safetensors", tensors)) for name in "abc"]


def load(engine: Engine, path: str, orphans=()) -> str:
    name = path[-len("a.safetensors")]
    engine.load(name, path, ParallelismConfig(), torch.float32, lambda *_: None, orphans=orphans)
    return name


def predict(engine: Engine, name: str, batch: int = 1, divisible: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 5, 192, generator=generator)
    engine.keep(name, {"context": context.expand(batch, -1, -1)}, [])
    x = torch.randn(1, 128, 2, 2, generator=generator).expand(batch, -1, -1, -1)
    guidance = {"guidance": torch.tensor([4.0]).expand(batch)}
    return engine.predict(name, x, torch.full((batch,), 0.5), "context", [], guidance, divisible=divisible)[0]


def places(engine: Engine) -> dict[str, str]:
    return {name: model.parts["transformer"].place.value for name, model in engine.models.items()}


def test_the_least_recently_used_leaves_and_comes_back(engine, device, files, notices):
    names = [load(engine, path) for path in files[:2]]
    expected = [predict(engine, name) for name in names]
    assert notices == []
    size = engine.models["a"].parts["transformer"].nbytes
    device.size = int(2.5 * size)
    predict(engine, "a")
    load(engine, files[2])
    assert places(engine) == {"a": "device", "b": "file", "c": "device"}
    (notice,) = notices
    assert notice == (
        f"{size / 2**30:.1f} GiB a rank of the transformer of b.safetensors unloaded to make room for the transformer "
        "of c.safetensors; the next use reads it again"
    )
    assert torch.equal(predict(engine, "b"), expected[1])
    assert places(engine) == {"a": "file", "b": "device", "c": "device"}  # c was loaded after a was used
    assert torch.equal(predict(engine, "a"), expected[0])


def test_what_nobody_uses_leaves_first_and_for_good(engine, device, files, notices):
    names = [load(engine, path) for path in files[:2]]
    predict(engine, "a")
    size = engine.models["a"].parts["transformer"].nbytes
    device.size = int(2.5 * size)
    predict(engine, "b")
    predict(engine, "a")  # the last one used, but nobody's
    load(engine, files[2], orphans=[names[0]])
    assert places(engine) == {"a": "file", "b": "device", "c": "device"}
    assert notices[-1].endswith("unloaded to make room for the transformer of c.safetensors")
    load(engine, files[0])  # somebody asks for it again
    assert not engine.models["a"].orphan
    predict(engine, "a")
    assert places(engine)["a"] == "device"


def test_what_nobody_uses_takes_no_host_memory(engine, files):
    names = [load(engine, path) for path in files[:2]]
    for name in names:
        engine.models[name].parts["transformer"].to_host()
    load(engine, files[2], orphans=names[:1])
    assert places(engine) == {"a": "file", "b": "host", "c": "device"}
    assert engine.models["a"].parts["transformer"].host is None


def test_room_for_work_is_made_too_where_it_can_be(engine, device, files, notices):
    for path in files[:2]:
        load(engine, path)
    part = engine.models["a"].parts["transformer"]
    work = part.workspace(5 + 4)
    device.size = 2 * part.nbytes + work // 2
    predict(engine, "a")
    assert places(engine) == {"a": "device", "b": "file"}
    # Alone it goes on with what there is: the work's size is an estimate.
    device.size = part.nbytes + 1
    engine.unload("b")
    predict(engine, "a")


def test_a_batch_that_can_be_divided_is_refused_where_it_does_not_fit(engine, device, files):
    load(engine, files[0])
    part = engine.models["a"].parts["transformer"]
    whole = predict(engine, "a", batch=2)
    device.size = part.nbytes + part.workspace(2 * (5 + 4)) - 1
    engine.recover(alone=False)  # room is made anew
    for _ in range(2):
        with pytest.raises(BatchTooLargeError, match=r"a batch of 2 needs .* GiB beside the transformer of a"):
            predict(engine, "a", batch=2, divisible=True)
        assert relative_error(predict(engine, "a", divisible=True), whole[:1]) < 1e-6
    assert torch.equal(predict(engine, "a", batch=2), whole)  # who cannot divide it has it tried
    device.size += 1
    assert torch.equal(predict(engine, "a", batch=2, divisible=True), whole)


def test_what_fails_on_one_rank_alone_leaves_its_view_of_the_room_as_the_others_have_it(engine, files):
    load(engine, files[0])
    predict(engine, "a")
    granted = engine._granted
    with pytest.raises(ValueError, match="no model"):
        engine.keep("z", {}, [])
    assert engine.alone
    engine.recover(engine.alone)
    assert engine._granted == granted  # the others do not make room with it in the next step


def test_what_cannot_fit_is_refused_and_the_others_stay(engine, device, files, notices):
    load(engine, files[0])
    expected = predict(engine, "a")
    size = engine.models["a"].parts["transformer"].nbytes
    device.size = size - 1
    message = r"transformer of b\.safetensors needs .* GiB on each device.*take a larger TP degree or more devices"
    with pytest.raises(ValueError, match=message):
        load(engine, files[1])
    assert list(engine.models) == ["a"]
    device.size = size
    assert torch.equal(predict(engine, "a"), expected)


def test_steps_in_a_row_look_at_nothing(engine, files, monkeypatch):
    load(engine, files[0])
    predict(engine, "a")
    asked = []
    monkeypatch.setattr(engine.room, "make", lambda *args: asked.append(args))
    predict(engine, "a")
    assert asked == []


def test_host_memory_that_is_short_is_not_taken(device, files, notices):
    engine = Engine(
        torch.device("cpu"), notices.append, Room(torch.device("cpu"), SINGLE, notices.append, lambda: 1, lambda: MIB)
    )
    settings_part = engine._build(files[0], ParallelismConfig(), torch.float32, "cast", "auto").parts["transformer"]
    assert not engine.room.fits_host(settings_part)


def test_a_model_of_that_name_is_loaded_once(engine, files, monkeypatch):
    load(engine, files[0])
    monkeypatch.setattr(engine, "_build", lambda *_: pytest.fail("it was there"))
    load(engine, files[0])


def test_a_damaged_file_leaves_nothing(engine, tmp_path, files):
    tensors = flux2_tensors(heads=1, double=1, single=1)
    tensors["single_blocks.0.linear1.weight"][0, 0] = float("nan")
    load(engine, files[0])
    with pytest.raises(ValueError, match="not finite"):
        load(engine, str(write(tmp_path / "d.safetensors", tensors)))
    assert list(engine.models) == ["a"]
    assert {key[0] for key in engine._used} == {"a"}


@pytest.mark.parametrize("fp8", ["stored", "cast"])
def test_what_stays_in_8_bits_is_counted_so(engine, device, tmp_path, fp8):
    """Or a model would be refused that fits."""
    tensors, metadata = to_fp8(flux2_tensors(heads=2, double=1, single=2), "metadata")
    path = str(write(tmp_path / "e.safetensors", tensors, metadata=metadata))
    planned = engine._build(path, ParallelismConfig(), torch.bfloat16, fp8, "auto").parts["transformer"].nbytes
    device.parts.clear()
    device.size = planned
    engine.load("e", path, ParallelismConfig(), torch.bfloat16, lambda *_: None, fp8=fp8)
    assert engine.models["e"].parts["transformer"].nbytes == planned
    weights = [tensor for tensor in tensors.values() if tensor.ndim]  # the scales have no dims
    sizes = {"stored": sum(tensor.nbytes for tensor in weights), "cast": 2 * sum(tensor.numel() for tensor in weights)}
    assert planned == sizes[fp8]
