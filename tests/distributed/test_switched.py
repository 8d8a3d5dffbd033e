"""Patches of weights that change while a model is in use: what comes and goes, what stays valid, what fails."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import switched_cases
from tests.distributed.adapter_cases import SIZE
from tests.distributed.test_adapters import TOLERANCE
from tests.single_file import flux2_tensors, to_fp8, write

LAYOUTS = {"single": ParallelismConfig(), "Ulysses-2-TP-2": ParallelismConfig(ulysses_size=2, tp_size=2)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("switched")
    tensors = flux2_tensors(**SIZE)
    stored, metadata = to_fp8(tensors, "metadata")
    return {
        "plain": str(write(folder / "plain.safetensors", tensors)),
        "fp8": str(write(folder / "fp8.safetensors", stored, metadata=metadata)),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_comes_and_goes_is_never_merged(world, files, name):
    """It stands beside plain weights, too, over what is merged; off is a number, for which nothing is read."""
    for found in world.run(switched_cases.switched, LAYOUTS[name], files["plain"]):
        assert found["error"] <= TOLERANCE
        assert found["count"] == 25
        assert found["read"] == []
        assert found["stays"]
        assert found["off"] <= 1e-5
        assert found["on"] > 1e-3
        assert found["again"]
        assert found["asked"]
        assert not found["left"]
        assert found["undone"]


@pytest.mark.parametrize(
    "plain", [pytest.param(True, id="plain", marks=pytest.mark.thorough), pytest.param(False, id="8 bits")]
)
def test_compiled_blocks_stay_valid(world, files, plain):
    """Within a class of ranks, for any strength, and for what was there before."""
    file = files["plain" if plain else "fp8"]
    for found in world.run(switched_cases.compiled, LAYOUTS["single"], file, plain, timeout=300):
        assert max(found["errors"]) <= 1e-4
        first, *same, without, again, off, last = found["graphs"]
        assert first > 0
        assert set(same) == {first}
        assert first <= without
        assert {again, off, last} == {without}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_the_same_is_not_read_again(world, files, name):
    for found in world.run(switched_cases.read_again, LAYOUTS[name], files["plain"]):
        one, everything = found["read"]
        assert one == 1
        assert everything >= 20
        assert found["undone"]
        assert found["same"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_applied(world, files, name):
    for found in world.run(switched_cases.half_applied, LAYOUTS[name], files["plain"]):
        assert "copy-" in found["text"]
        assert [found[key] for key in ("failed", "failed again", "loading failed")] == ["no room"] * 3
        assert all(found[key] for key in ("after the file", "after half", "whole", "place", "loaded"))
