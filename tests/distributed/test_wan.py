"""Wan: every layout computes what one process computes with diffusers' untouched model."""

import pytest
import torch

from parallel_backend import ParallelismConfig
from tests.distributed import wan_cases
from tests.distributed.layouts import REFERENCE_TABLE, all_layouts
from tests.distributed.wan_cases import IMAGE, Case
from tests.errors import relative_error

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; a wrong token, head, frame or position costs more than 1e-2."""

SINGLE = ParallelismConfig()
LAYOUTS = {
    **REFERENCE_TABLE,
    "single": SINGLE,
    "TP-3": ParallelismConfig(tp_size=3),
    "Ring-3": ParallelismConfig(ring_size=3),
    "Ulysses-3-TP-2": ParallelismConfig(ulysses_size=3, tp_size=2),
    "USP-2-3": ParallelismConfig(ulysses_size=2, ring_size=3),
}
OTHER_HEADS = ("TP-3", "Ulysses-3-TP-2", "USP-2-3")
"""Degrees that 8 heads do not divide by, but 12 do, as of the 1.3B model."""
PLAIN = [Case((1, 2, 2)), Case((3, 6, 10)), Case((5, 4, 6), batch=2, text=17), Case((2, 2, 6), batch=3)]
WITH_IMAGES = [Case((3, 6, 4), image=9), Case((2, 4, 4), batch=2, image=9), Case((3, 2, 2), image=9)]
FRAMES = [
    Case((3, 4, 6), timesteps=(0, 700, 700)),
    Case((3, 4, 6), batch=2, timesteps=(0, 700, 700, 0, 700, 700)),
    Case((5, 2, 4), timesteps=(0, 10, 200, 500, 900)),
]


@pytest.mark.parametrize("name", all_layouts())
def test_transformer(world, name):
    for errors in world.run(wan_cases.transformer_errors, LAYOUTS[name], PLAIN):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_heads_that_other_degrees_divide(world, name):
    for errors in world.run(wan_cases.transformer_errors, LAYOUTS[name], PLAIN[1:], num_attention_heads=12):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=("single", *REFERENCE_TABLE)))
def test_image_tokens(world, name):
    """Wan 2.1's I2V: 36 channels, and cross-attention to an image with weights of its own."""
    changes = {"in_channels": 36, "image_dim": IMAGE, "added_kv_proj_dim": 128}
    for errors in world.run(wan_cases.transformer_errors, LAYOUTS[name], WITH_IMAGES, **changes):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=("single", *REFERENCE_TABLE)))
def test_timesteps_of_tokens(world, name):
    for errors in world.run(wan_cases.transformer_errors, LAYOUTS[name], FRAMES):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("case", FRAMES, ids=["two", "batch", "each"])
@pytest.mark.parametrize("name", ["single", "Ring-3", pytest.param("Ulysses-2-TP-4", marks=pytest.mark.thorough)])
def test_timesteps_of_frames(world, name, case):
    """Distinct values become rows: two where a frame is given, however many tokens there are."""
    for error, rows in world.run(wan_cases.frames_error, LAYOUTS[name], case):
        assert error <= TOLERANCE
        assert rows == len(set(case.timesteps))


@pytest.mark.parametrize("name", ["single", "TP-2", pytest.param("Ulysses-2-TP-4", marks=pytest.mark.thorough)])
def test_mlp_in_pieces(world, name):
    for errors in world.run(wan_cases.transformer_errors, LAYOUTS[name], PLAIN[1:], piece=2):
        assert max(errors) <= TOLERANCE


def test_undone(world):
    assert max(world.run(wan_cases.undone_error, LAYOUTS["Ulysses-2"])) == 0


@pytest.mark.parametrize(("name", "tp"), [("single", 1), ("TP-4", 4)])
def test_keys_of_a_conditioning_are_made_once(world, name, tp):
    for found in world.run(wan_cases.kept_keys, LAYOUTS[name]):
        # Three blocks make theirs of each text when it is new; four texts of 512 tokens have room, the fifth has not.
        assert found["made"] == [3, 6, 6, 6, 9, 12, 15, 18]
        width = wan_cases.HEADS * wan_cases.HEAD_DIM
        assert found["nbytes"] == 4 * 4 * 512 * (width + 3 * 2 * width // tp)
        assert found["forgotten"] == 0
        assert found["stale"] == 0 < found["changed"]  # and so whoever changes weights has to say so
        assert found["grown"] == 0  # more rows than are kept of all


@pytest.mark.parametrize("name", ["TP-2", "Ring-3", pytest.param("Ulysses-4-TP-2", marks=pytest.mark.thorough)])
def test_cache(world, name):
    """All layouts compute the same steps."""
    ((expected, wanted),) = world.run(wan_cases.cached_run, LAYOUTS["single"])
    assert 2 < sum(expected) < len(expected)
    for computed, predictions in world.run(wan_cases.cached_run, LAYOUTS[name]):
        assert computed == expected
        assert max(map(relative_error, predictions, wanted)) <= TOLERANCE
        assert all(torch.isfinite(one).all() for one in predictions)


@pytest.mark.parametrize("name", ["single", pytest.param("USP-2-2-TP-2", marks=pytest.mark.thorough)])
def test_presets_for_two_experts(world, name):
    """Those for few steps leave out most of both halves; the others compute the first 8 of each 10."""
    for found in world.run(wan_cases.preset_runs, LAYOUTS[name]):
        assert found["high_noise"][:2] == (6, 8)
        assert found["quality"][:2] == found["speed"][:2] == (2, 2)
        assert 0.02 < found["high_noise"][2] < 0.06
        assert found["quality"][2] < found["high_noise"][2] / 4
