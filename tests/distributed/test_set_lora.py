"""set_lora on sharded models: each rank's slices of the merged weights, and to the bit what was there before."""

import pytest

from parallel_backend import ParallelismConfig
from tests.distributed import lora_cases
from tests.distributed.layouts import REFERENCE_TABLE, all_layouts
from tests.lora_files import factors_of, write_lora

TOLERANCE = 1e-5
STYLES = {"flux2": ("comfyui", "diffusers"), "qwen_image": ("bare", "lycoris"), "z_image": ("mixed", "comfyui")}
"""Of the two files: fused and not, as the family's trainers write them."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, list[str]]:
    """Two LoRA files for each family."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for family, styles in STYLES.items():
        model = lora_cases.build(family)
        kind = lora_cases.kind_of(model)
        found[family] = [
            str(write_lora(folder / f"{family}{seed}.safetensors", style, kind, factors_of(model, kind, seed)))
            for seed, style in enumerate(styles, start=1)
        ]
    return found


def check(found, layout: ParallelismConfig) -> None:
    for rank in found:
        assert max(rank["errors"]) <= TOLERANCE
        assert rank["same bits"]
        assert rank["same memory"]
        assert not rank["left"]
    # What ranks hold alike is kept once among them, in about equal shares.
    share = found[0]["changed"] / layout.cp_size
    assert all(0 < rank["kept"] < 1.5 * share for rank in found)


@pytest.mark.parametrize(("family", "name"), all_layouts("flux2"))
def test_flux2(world, files, family, name):
    check(world.run(lora_cases.on_and_off, REFERENCE_TABLE[name], family, files[family]), REFERENCE_TABLE[name])


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("flux2", ParallelismConfig()),
        ("qwen_image", ParallelismConfig(ulysses_size=2, tp_size=2)),
        ("z_image", ParallelismConfig(ring_size=2, tp_size=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_other_families(world, files, family, layout):
    check(world.run(lora_cases.on_and_off, layout, family, files[family]), layout)


@pytest.mark.parametrize("name", ["TP-4", "USP-2-2-TP-2"])
def test_what_the_model_computes(world, files, name):
    for with_it, without in world.run(lora_cases.forward_error, REFERENCE_TABLE[name], files["flux2"]):
        assert with_it <= TOLERANCE
        assert without > 1e-2


def test_a_file_that_one_rank_lacks(world, files):
    layout = ParallelismConfig(ulysses_size=2, tp_size=2)
    for text, same, error in world.run(lora_cases.missing_on_one_rank, layout, files["flux2"][0]):
        assert "gone.safetensors is missing" in text
        assert same
        assert error <= TOLERANCE


def test_taken_off_after_the_layout(world, files):
    layout = ParallelismConfig(ulysses_size=2, ring_size=2)
    assert all(world.run(lora_cases.off_after_disabling, layout, files["flux2"][0]))
