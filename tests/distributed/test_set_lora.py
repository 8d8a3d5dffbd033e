"""set_lora on sharded models: each rank's slices of the merged weights, and to the bit what was there before."""

import pytest
import torch

from parallel_backend import ParallelismConfig
from tests.distributed import lora_cases, pipeline_cases
from tests.distributed.layouts import REFERENCE_TABLE, all_layouts
from tests.errors import relative_error
from tests.lora_files import added, factors_of, write_lora
from tests.tiny_pipeline import make_tiny_pipeline

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


PIPELINE_LAYOUT = ParallelismConfig(ulysses_size=4, tp_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def pipeline_file(folder, tmp_path_factory) -> str:
    transformer = pipeline_cases.fresh_pipeline(folder).transformer
    kind = lora_cases.kind_of(transformer)
    factors = factors_of(transformer, kind)
    return str(write_lora(tmp_path_factory.mktemp("lora") / "one.safetensors", "diffusers", kind, factors))


@pytest.fixture(scope="module")
def expected(folder, pipeline_file) -> torch.Tensor:
    """Of one process, with the LoRA in the weights."""
    pipe = pipeline_cases.fresh_pipeline(folder)
    kind, state = lora_cases.kind_of(pipe.transformer), pipe.transformer.state_dict()
    pipe.transformer.load_state_dict(added(state, (factors_of(pipe.transformer, kind), 0.7)))
    return pipeline_cases.latents(pipe)


def test_a_pipeline(world, folder, pipeline_file, expected):
    without = pipeline_cases.latents(pipeline_cases.fresh_pipeline(folder))
    assert relative_error(expected, without) > 1e-2
    for latents in world.run(lora_cases.set_after, PIPELINE_LAYOUT, folder, pipeline_file):
        assert relative_error(latents, expected) <= TOLERANCE


def test_fused_before_by_diffusers(world, folder, pipeline_file, expected):
    pytest.importorskip("peft", reason="diffusers loads LoRAs with peft alone, which is not installed")
    for latents, *said in world.run(lora_cases.fused_before, PIPELINE_LAYOUT, folder, pipeline_file):
        assert relative_error(latents, expected) <= TOLERANCE
        assert len(said) == 2
        assert all("has layers of peft" in text and "fuse_lora and unload_lora_weights" in text for text in said)


def test_taken_off_after_the_layout(world, files):
    layout = ParallelismConfig(ulysses_size=2, ring_size=2)
    assert all(world.run(lora_cases.off_after_disabling, layout, files["flux2"][0]))
