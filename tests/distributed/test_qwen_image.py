"""Qwen-Image: every layout of the reference table computes what one process computes with the untouched models."""

import pytest

from tests.distributed import qwen_cases
from tests.distributed.layouts import REFERENCE_TABLE, TEXT_ENCODER_LAYOUTS, all_layouts

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; a wrong token, head or mask costs more than 1e-2."""

ODD_LENGTHS = dict(text=7, sizes=[(5, 7)], batch=1)
REFERENCES = dict(text=9, sizes=[(3, 4), (4, 3), (2, 2)], batch=2)
MASKS_OF_DIFFERENT_LENGTHS = dict(text=11, sizes=[(3, 5), (2, 3)], batch=2, masked=[[8, 9, 10], [2, 5, 10]])
FEWER_TOKENS_THAN_RANKS = dict(text=1, sizes=[(1, 3)], batch=1)
NO_TEXT_AT_ALL, HOLES = (dict(text=5, sizes=[(4, 3)], batch=1, masked=[hidden]) for hidden in ([0, 1, 2, 3, 4], [1, 3]))


@pytest.mark.parametrize("name", all_layouts())
def test_transformer(world, name):
    shapes = [ODD_LENGTHS, MASKS_OF_DIFFERENT_LENGTHS, FEWER_TOKENS_THAN_RANKS]
    for errors in world.run(qwen_cases.transformer_errors, REFERENCE_TABLE[name], shapes):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts())
def test_references_at_timestep_zero(world, name):
    shapes = [REFERENCES]
    for errors in world.run(qwen_cases.transformer_errors, REFERENCE_TABLE[name], shapes, zero_cond_t=True):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=["USP-2-2-TP-2", "Ring-8", "Ulysses-8"]))
def test_masks_of_one_sample(world, name):
    for errors in world.run(qwen_cases.transformer_errors, REFERENCE_TABLE[name], [NO_TEXT_AT_ALL, HOLES]):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=["USP-2-2-TP-2", "Ulysses-4-TP-2", "Ring-4-TP-2"]))
def test_reference_methods_and_odd_latents(world, name):
    sizes = [(5, 7), (8, 3), (3, 8)]
    for errors in world.run(qwen_cases.latent_errors, REFERENCE_TABLE[name], sizes=sizes, batch=2):
        assert len(errors) == 4
        assert max(errors.values()) <= TOLERANCE


def test_undone(world):
    assert max(world.run(qwen_cases.undone_error, REFERENCE_TABLE["Ulysses-8"])) == 0


@pytest.mark.parametrize("name", ["TP-8", "TP-2"])
def test_one_gather_a_step_for_all_modulation(world, name):
    assert set(world.run(qwen_cases.modulation_gathers, REFERENCE_TABLE[name])) == {1}


@pytest.mark.parametrize("name", TEXT_ENCODER_LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (8, 8)])
def test_text_encoder(world, name, heads, kv_heads):
    for errors in world.run(qwen_cases.text_errors, REFERENCE_TABLE[name], heads=heads, kv_heads=kv_heads):
        assert max(errors) <= TOLERANCE
