"""Every layout of the reference table computes what one process computes with the untouched model."""

import pytest

from tests.distributed import cases
from tests.distributed.layouts import REFERENCE_TABLE, TEXT_ENCODER_LAYOUTS, all_layouts

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; 1e-6 was seen, a wrong token or head costs more than 1e-2."""

EVERY_LAYOUT = pytest.mark.parametrize("name", REFERENCE_TABLE)


# Text tokens, rows and columns of the image and of references, batch.
EVEN = (16, [(4, 8)], 1)
ODD_WITH_A_REFERENCE = (7, [(5, 7), (3, 4)], 2)
FEWER_TOKENS_THAN_RANKS = (1, [(1, 3)], 1)
THREE_REFERENCES = (9, [(6, 4), (2, 2), (3, 5), (1, 1)], 4)


@EVERY_LAYOUT
def test_transformer(world, name):
    shapes = [EVEN, ODD_WITH_A_REFERENCE, FEWER_TOKENS_THAN_RANKS]
    for errors in world.run(cases.transformer_errors, REFERENCE_TABLE[name], shapes):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts(names=["Ulysses-4-TP-2", "USP-2-2-TP-2", "Ring-8"]))
def test_three_references_and_batch_4(world, name):
    for errors in world.run(cases.transformer_errors, REFERENCE_TABLE[name], [THREE_REFERENCES]):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", all_layouts())
def test_many_tokens(world, name):
    # MLPs of two tokens at a time, and of no long ones where a rank has hardly any.
    for errors in world.run(cases.transformer_errors, REFERENCE_TABLE[name], [EVEN, ODD_WITH_A_REFERENCE], piece=2):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("changes", [{"mlp_ratio": 2.5}, {"mlp_ratio": 4.0}, {"guidance_embeds": False}], ids=str)
def test_other_configurations(world, changes):
    for errors in world.run(cases.transformer_errors, REFERENCE_TABLE["Ulysses-2-TP-4"], [EVEN], **changes):
        assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", TEXT_ENCODER_LAYOUTS)
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_text_encoder(world, name, kv_heads):
    errors = world.run(cases.text_encoder_error, REFERENCE_TABLE[name], kv_heads, batch=2, length=11)
    assert max(errors) <= TOLERANCE
