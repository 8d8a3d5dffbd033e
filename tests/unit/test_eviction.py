"""What leaves a full device so that the next part fits: in one process, with a device that is said to be small."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from parallel_backend import DBCacheConfig, ParallelismConfig
from parallel_backend.cache.config import CacheSettings
from parallel_backend.cache.decision import Decision, Evaluation
from parallel_backend.mesh import SINGLE
from parallel_backend.runtime.errors import BatchTooLargeError
from parallel_backend.runtime.rank.component import Component, Place
from parallel_backend.runtime.rank.engine import Engine
from parallel_backend.runtime.rank.eviction import Eviction
from parallel_backend.runtime.rank.transformer_component import TransformerComponent
from tests.errors import relative_error
from tests.single_file import flux2_tensors, to_fp8, write
from tests.watched_engine import watched_engine

MIB = 2**20


class SmallDevice:
    """Memory of a device that holds what the parts on it take, and no more than its size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[Component] = []

    def available(self) -> int:
        there = [part for part in self.parts if part.place is Place.DEVICE]
        kept = sum(part.cache.kept_bytes() for part in there if isinstance(part, TransformerComponent))
        return self.size - sum(part.nbytes for part in there) - kept


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def device() -> SmallDevice:
    return SmallDevice(10**12)


@pytest.fixture
def engine(device, notices, monkeypatch) -> Engine:
    room = Eviction(torch.device("cpu"), SINGLE, notices.append, device.available, lambda: 10**12)
    return watched_engine(room, device.parts, monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    tensors = flux2_tensors(heads=1, double=1, single=1)
    return [str(write(folder / f"{name}.safetensors", tensors)) for name in "abc"]


def load(engine: Engine, path: str, orphans=()) -> str:
    name = path[-len("a.safetensors")]
    engine.load(name, path, ParallelismConfig(), torch.float32, lambda *_: None, orphans=orphans)
    return name


def predict(engine: Engine, name: str, **options) -> torch.Tensor:
    return evaluate(engine, name, **options)[0]


def evaluate(
    engine: Engine, name: str, cache: dict | None = None, batch: int = 1, divisible: bool = False
) -> tuple[torch.Tensor, Decision | None]:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 5, 192, generator=generator)
    engine.keep(name, {"context": context.expand(batch, -1, -1)}, [])
    x = torch.randn(1, 128, 2, 2, generator=generator).expand(batch, -1, -1, -1)
    guidance = {"guidance": torch.tensor([4.0]).expand(batch)}
    return engine.predict(name, x, torch.full((batch,), 0.5), "context", [], guidance, cache=cache, divisible=divisible)


TOKENS = 5 + 2 * 2
"""Of `evaluate`."""


def step(engine: Engine, name: str, run: str, position: int, streams: int, order: int = 1) -> list[str]:
    """Reasons of one step of a run with so many conditionings that caches whatever it can; in capitals if computed."""
    config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=0, residual_diff_threshold=1)
    settings, said = CacheSettings.with_order(config, order).to_dict(), []
    for stream in range(streams):
        evaluation = asdict(Evaluation(run, str(stream), float(position)))
        decision = evaluate(engine, name, {"settings": settings, "evaluation": evaluation})[1]
        said.append(decision.reason.upper() if decision.computed else decision.reason)
    return said


def places(engine: Engine) -> dict[str, str]:
    return {name: model.components["transformer"].place.value for name, model in engine.models.items()}


def test_the_least_recently_used_leaves_and_comes_back(engine, device, files, notices):
    names = [load(engine, path) for path in files[:2]]
    expected = [predict(engine, name) for name in names]
    assert notices == []
    size = engine.models["a"].components["transformer"].nbytes
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
    size = engine.models["a"].components["transformer"].nbytes
    device.size = int(2.5 * size)
    predict(engine, "b")
    predict(engine, "a")  # the last one used, but nobody's
    load(engine, files[2], orphans=[names[0]])
    assert places(engine) == {"a": "file", "b": "device", "c": "device"}
    assert notices[-1].endswith("unloaded to make room for the transformer of c.safetensors")
    load(engine, files[0])  # somebody asks for it again
    assert not engine.residents.orphans
    predict(engine, "a")
    assert places(engine)["a"] == "device"


def test_what_nobody_uses_takes_no_host_memory(engine, files):
    names = [load(engine, path) for path in files[:2]]
    for name in names:
        engine.models[name].components["transformer"].to_host()
    load(engine, files[2], orphans=names[:1])
    assert places(engine) == {"a": "file", "b": "host", "c": "device"}
    assert engine.models["a"].components["transformer"].host is None


def test_room_for_work_is_made_too_where_it_can_be(engine, device, files, notices):
    for path in files[:2]:
        load(engine, path)
    part = engine.models["a"].components["transformer"]
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
    part = engine.models["a"].components["transformer"]
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
    granted = engine.residents.granted
    with pytest.raises(ValueError, match="no model"):
        engine.keep("z", {}, [])
    assert engine.alone
    engine.recover(engine.alone)
    assert engine.residents.granted == granted  # the others do not make room with it in the next step


def test_what_cannot_fit_is_refused_and_the_others_stay(engine, device, files, notices):
    load(engine, files[0])
    expected = predict(engine, "a")
    size = engine.models["a"].components["transformer"].nbytes
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
    monkeypatch.setattr(engine.eviction, "make", lambda *args: asked.append(args))
    predict(engine, "a")
    assert asked == []


def test_host_memory_that_is_short_is_not_taken(device, files, notices):
    engine = Engine(
        torch.device("cpu"),
        notices.append,
        Eviction(torch.device("cpu"), SINGLE, notices.append, lambda: 1, lambda: MIB),
    )
    settings_part = engine._build(files[0], ParallelismConfig(), torch.float32, "cast", "auto").components[
        "transformer"
    ]
    assert not engine.eviction.fits_host(settings_part)


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
    assert {key[0] for key in engine.residents.used} == {"a"}


@pytest.mark.parametrize("fp8", ["stored", "cast"])
def test_what_stays_in_8_bits_is_counted_so(engine, device, tmp_path, fp8):
    """Or a model would be refused that fits."""
    tensors, metadata = to_fp8(flux2_tensors(heads=2, double=1, single=2), "metadata")
    path = str(write(tmp_path / "e.safetensors", tensors, metadata=metadata))
    planned = engine._build(path, ParallelismConfig(), torch.bfloat16, fp8, "auto").components["transformer"].nbytes
    device.parts.clear()
    device.size = planned
    engine.load("e", path, ParallelismConfig(), torch.bfloat16, lambda *_: None, fp8=fp8)
    assert engine.models["e"].components["transformer"].nbytes == planned
    weights = [tensor for tensor in tensors.values() if tensor.ndim]  # the scales have no dims
    sizes = {"stored": sum(tensor.nbytes for tensor in weights), "cast": 2 * sum(tensor.numel() for tensor in weights)}
    assert planned == sizes[fp8]


class TestResiduals:
    """What the block cache keeps of a run's conditionings."""

    NEW, NONE = "NOTHING CACHED YET", "NO ROOM"

    def test_as_many_conditionings_as_there_are_are_cached(self, engine, files, notices):
        load(engine, files[0])
        assert step(engine, "a", "run", 0, 20) == [self.NEW] * 20
        assert step(engine, "a", "run", 1, 20) == ["threshold"] * 20
        assert notices == []

    def test_those_that_do_not_fit_are_computed_and_the_others_stay_cached(self, engine, device, files, notices):
        load(engine, files[0])
        part = engine.models["a"].components["transformer"]
        one = part.residual_bytes(TOKENS, 1)
        # Of two conditionings less is kept than is said to be needed while one is renewed.
        device.size = part.nbytes + part.workspace(TOKENS) + 2 * one
        first = step(engine, "a", "run", 0, 5)
        fit = first.count(self.NEW)
        assert 2 <= fit < 5
        assert first == [self.NEW] * fit + [self.NONE] * (5 - fit)
        for position in (1, 2):
            assert step(engine, "a", "run", position, 5) == ["threshold"] * fit + [self.NONE] * (5 - fit)
        (notice,) = notices
        assert notice.startswith("no room for the block cache to keep 0.0 GiB a rank for one more conditioning")
        assert device.available() >= part.workspace(TOKENS)

    @pytest.mark.parametrize("order", [0, 2])
    def test_what_is_said_to_be_needed_is(self, engine, files, order):
        load(engine, files[0])
        part, never = engine.models["a"].components["transformer"], DBCacheConfig(residual_diff_threshold=0)
        settings = CacheSettings.with_order(replace(never, Fn_compute_blocks=1), order).to_dict()
        for position in range(4):
            evaluation = asdict(Evaluation("run", "", float(position)))
            kept = part.cache.kept_bytes() + part.cache.growth_bytes()
            evaluate(engine, "a", {"settings": settings, "evaluation": evaluation})
            assert position == 0 or part.cache.kept_bytes() + part.cache.growth_bytes() == kept
        assert part.cache.growth_bytes() == 0
        assert part.cache.kept_bytes() < part.residual_bytes(TOKENS, order) < 3 * part.cache.kept_bytes()

    def test_older_runs_make_way_before_a_model_does(self, engine, device, files, notices):
        for path in files[:2]:
            load(engine, path)
        part = engine.models["a"].components["transformer"]
        for run in ("first", "second"):
            step(engine, "a", run, 0, 3)
        kept = part.cache.kept_bytes() // 2
        beside = part.nbytes + part.workspace(TOKENS)
        device.size = 2 * part.nbytes + part.workspace(TOKENS) + kept
        predict(engine, "b")
        assert part.cache.runs() == ["second"]
        assert part.cache.kept_bytes() == kept
        # A run's own conditionings never make way for its next; another transformer does not, either.
        assert self.NONE in step(engine, "a", "second", 1, 6)
        assert part.cache.kept_bytes() >= kept
        device.size = beside + part.nbytes - 1
        load(engine, files[2])
        assert part.cache.runs() == []
        assert places(engine) == {"a": "device", "b": "file", "c": "device"}
        assert len(notices) == 2

    def test_they_leave_the_device_with_their_model(self, engine, files):
        load(engine, files[0])
        step(engine, "a", "run", 0, 2)
        part = engine.models["a"].components["transformer"]
        assert part.cache.kept_bytes() > 0
        part.to_host()
        assert part.cache.kept_bytes() == 0
        assert step(engine, "a", "run", 1, 2) == [self.NEW] * 2
