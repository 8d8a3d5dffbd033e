"""Degrees, devices and models of any kind: a ValueError that says what would do, or they are taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel_backend import ParallelismConfig
from parallel_backend.cache.config import CacheSettings
from parallel_backend.planning.devices import resolve_devices
from parallel_backend.runtime.group_config import ModelConfig
from tests.tiny_pipeline import make_tiny_pipeline

ANYTHING = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.integers(), max_size=2)
)
DEVICES = st.text(max_size=12) | st.lists(st.integers(-1, 9).map(str) | st.just("cuda:1"), max_size=4).map(",".join)


@given(ANYTHING, ANYTHING, ANYTHING)
def test_degrees(ulysses, ring, tp):
    try:
        layout = ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)
    except ValueError as found:
        error = str(found)
        assert "must be a whole number of at least 1" in error
        return
    assert layout.world_size == (ulysses or 1) * (ring or 1) * (tp or 1)
    assert layout.name


@pytest.fixture(scope="module")
def _four_gpus():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        yield


@pytest.mark.usefixtures("_four_gpus")
@given(DEVICES, st.integers(1, 8))
def test_devices(spec: str, ranks: int):
    try:
        devices = resolve_devices(spec, ranks)
    except ValueError as found:
        error = str(found)
        assert any(word in error for word in ("GPU", "write 'auto'")), error
        return
    assert devices.kind == "cpu" or len(set(devices.visible)) == ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 9),
    st.sampled_from(["cpu", "auto", "0"]) | st.text(max_size=5),
    st.sampled_from(["auto", "float32"]) | st.text(max_size=5),
    st.sampled_from(["cast", "auto"]) | st.text(max_size=5),
    st.sampled_from(["auto", "host"]) | st.text(max_size=5),
)  # fmt: skip
def test_models(folder, ulysses, ring, tp, devices, dtype, fp8, encoder_memory):
    layout = ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)
    try:
        config = ModelConfig.create(folder, layout, devices, dtype, fp8, encoder_memory)
    except ValueError:
        return
    assert 8 % (ulysses * tp) == 0  # the heads of the tiny model
    assert config.group.ranks == layout.world_size


@pytest.mark.parametrize("path", ["", ".", "/", "no-such-file", "/etc/passwd", "/dev/null", "a\0b", "x" * 5000])
def test_paths(path: str):
    with pytest.raises(ValueError, match=r"."):
        ModelConfig.create(path, ParallelismConfig(), "cpu")


@given(st.dictionaries(st.sampled_from(["config", "calibrator", "order"]) | st.text(max_size=8), ANYTHING, max_size=3))
def test_cache_settings_as_they_come_over_the_socket(values):
    with pytest.raises((ValueError, TypeError, LookupError)):
        CacheSettings.from_dict(values)
