"""Qwen-Image: every layout of the reference table computes what one process computes with the untouched models."""

import pytest

from tests.distributed import qwen_cases
from tests.distributed.layouts import REFERENCE_TABLE

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; a wrong token, head or mask costs more than 1e-2."""

EVERY_LAYOUT = pytest.mark.parametrize("name", REFERENCE_TABLE)
SHAPES = {
    "odd lengths": dict(text=7, sizes=[(5, 7)], batch=1),
    "references at zero, batch 2": dict(text=9, sizes=[(3, 4), (4, 3), (2, 2)], batch=2, zero_cond_t=True),
    "masks of different lengths": dict(text=11, sizes=[(3, 5), (2, 3)], batch=2, masked=[[8, 9, 10], [2, 5, 10]]),
    "fewer tokens than ranks": dict(text=1, sizes=[(1, 3)], batch=1),
}


@EVERY_LAYOUT
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer(world, name, shape):
    errors = world.run(qwen_cases.transformer_error, REFERENCE_TABLE[name], **SHAPES[shape])
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", ["Ring-8", "Ulysses-8", "USP-2-2-TP-2"])
@pytest.mark.parametrize("masked", [[[0, 1, 2, 3, 4]], [[1, 3]]], ids=["no text at all", "holes"])
def test_masks_of_one_sample(world, name, masked):
    shape = dict(text=5, sizes=[(4, 3)], batch=1, masked=masked)
    assert max(world.run(qwen_cases.transformer_error, REFERENCE_TABLE[name], **shape)) <= TOLERANCE


@pytest.mark.parametrize("method", qwen_cases.QWEN.conditioning_options["reference_method"])
def test_reference_methods_and_odd_latents(world, method):
    for name in ("Ulysses-4-TP-2", "Ring-4-TP-2"):
        sizes = [(5, 7), (8, 3), (3, 8)]
        errors = world.run(
            qwen_cases.latent_error, REFERENCE_TABLE[name], sizes=sizes, batch=2, reference_method=method
        )
        assert max(errors) <= TOLERANCE


def test_undone(world):
    assert max(world.run(qwen_cases.undone_error, REFERENCE_TABLE["Ulysses-8"])) == 0


@pytest.mark.parametrize("name", ["TP-8", "TP-2"])
def test_one_gather_a_step_for_all_modulation(world, name):
    assert set(world.run(qwen_cases.modulation_gathers, REFERENCE_TABLE[name])) == {1}


@EVERY_LAYOUT
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (8, 8)])
def test_text_encoder(world, name, heads, kv_heads):
    for images in (False, True):
        errors = world.run(qwen_cases.text_error, REFERENCE_TABLE[name], heads=heads, kv_heads=kv_heads, images=images)
        assert max(errors) <= TOLERANCE
