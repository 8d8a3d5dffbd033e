"""Patches of weights on every kind of shard: each rank's slice is that of a file with the patches in it."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import adapter_cases
from tests.single_file import flux2_tensors, to_fp8, write
from tests.text_encoder_file import text_tensors

LAYOUTS = {
    "single": ParallelismConfig(),
    "TP-4": ParallelismConfig(tp_size=4),
    "Ulysses-2": ParallelismConfig(ulysses_size=2),
    "Ulysses-2-TP-2": ParallelismConfig(ulysses_size=2, tp_size=2),
}
TOLERANCE = 1e-6
"""fp32: a product of three terms, summed in another order."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder, tensors = tmp_path_factory.mktemp("adapters"), flux2_tensors(**adapter_cases.SIZE)
    stored, metadata = to_fp8(tensors, "metadata")
    return {
        "plain": str(write(folder / "plain.safetensors", tensors)),
        "patched": str(write(folder / "patched.safetensors", adapter_cases.patched(tensors))),
        "wide": str(
            write(
                folder / "wide.safetensors",
                tensors
                | {
                    key: adapter_cases.applied(tensors[key], of)
                    for key, of in adapter_cases.wide_patches().patches.items()
                },
            )
        ),
        "fp8": str(write(folder / "fp8.safetensors", stored, metadata=metadata)),
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_merged(world, files, name):
    for found in world.run(adapter_cases.merged, LAYOUTS[name], files["plain"], files["patched"]):
        assert found.pop("undone")
        assert max(found.values()) <= TOLERANCE
        assert len(found) == 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_depends_on_more_than_a_slice(world, files, name):
    """DoRA, GLoRA and OFT on rows and columns: also blocks that begin on one rank and end on the next."""
    for found in world.run(adapter_cases.wide, LAYOUTS[name], files["plain"], files["wide"]):
        assert found["undone"]
        assert found["error"] <= 10 * TOLERANCE


@pytest.mark.parametrize("name", ["single", "Ulysses-2-TP-2"])
def test_beside_8_bits(world, files, name):
    for found in world.run(adapter_cases.beside, LAYOUTS[name], files["fp8"]):
        assert found["error"] <= TOLERANCE
        # Six in each stream of the double-stream block, of which three are one weight of the file, and two.
        assert found["count"] == 14
        assert not found["left"]


@pytest.mark.parametrize("name", ["single", "Ulysses-2-TP-2"])
def test_in_the_place_of_8_bits(world, files, name):
    """What is no product of thin matrices is added to the weight as it is stored, which comes back."""
    for found in world.run(adapter_cases.instead, LAYOUTS[name], files["fp8"]):
        assert found["error"] <= 10 * TOLERANCE
        assert found["count"] == 14
        assert not found["left"]


@pytest.mark.parametrize("wide", [False, True], ids=["each by itself", "together"])
def test_no_rank_holds_a_full_weight(world, files, wide):
    """Nothing is ever larger than a rank's slice in fp32, nor is what ranks exchange."""
    for seen, of_slice, full in world.run(adapter_cases.largest, LAYOUTS["TP-4"], files["plain"], wide):
        assert 0 < seen <= of_slice
        assert 3 * of_slice < full


def test_what_no_weight_takes_changes_nothing(world, files):
    for text, same in world.run(adapter_cases.refused, LAYOUTS["TP-4"], files["plain"]):
        assert "1 of 2 weights that the LoRA changes are not in the model, the first is not_there.weight" in text
        assert same


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (ParallelismConfig(), {}),
        (ParallelismConfig(tp_size=2), {}),
        (ParallelismConfig(ulysses_size=2, tp_size=2), {"kv_heads": 1}),
        pytest.param(
            ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2),
            {"heads": 8, "kv_heads": 2},
            marks=pytest.mark.thorough,
        ),
        (ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2), {"heads": 4, "kv_heads": 1}),
    ],
    ids=["one rank", "2 ranks", "4 ranks, one kv head", "8 ranks, 2 kv heads", "2 copies over 4, one kv head"],
)
def test_text_encoders(world, tmp_path, layout, size):
    """Rows that several ranks hold (of a kv head) count once where lengths and rotations are computed."""
    tensors = text_tensors(**size)
    of = adapter_cases.text_patches(tensors).patches
    changed = {key: adapter_cases.applied(tensors[key], of[key]) for key in of}
    path, patched = (str(write(tmp_path / name, one)) for name, one in
                     (("a.safetensors", tensors), ("b.safetensors", tensors | changed)))  # fmt: skip
    for found in world.run(adapter_cases.text, layout, path, patched):
        assert found["undone"]
        assert found["error"] <= 10 * TOLERANCE
