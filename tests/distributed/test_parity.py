"""Every layout of the reference table computes what one process computes with the untouched model."""

import pytest

from tests.distributed import cases
from tests.distributed.layouts import REFERENCE_TABLE

TOLERANCE = 1e-5
"""fp32: the layouts only reorder sums; 1e-6 was seen, a wrong token or head costs more than 1e-2."""

EVERY_LAYOUT = pytest.mark.parametrize("name", REFERENCE_TABLE)


@EVERY_LAYOUT
@pytest.mark.parametrize(
    ("text", "sizes", "batch"),
    [
        pytest.param(16, [(4, 8)], 1, id="even"),
        pytest.param(7, [(5, 7), (3, 4)], 2, id="odd lengths, one reference, batch 2"),
        pytest.param(1, [(1, 3)], 1, id="fewer tokens than ranks"),
    ],
)
def test_transformer(world, name, text, sizes, batch):
    errors = world.run(cases.transformer_error, REFERENCE_TABLE[name], text, sizes, batch)
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", ["Ulysses-4-TP-2", "USP-2-2-TP-2", "Ring-8"])
def test_three_references_and_batch_4(world, name):
    errors = world.run(cases.transformer_error, REFERENCE_TABLE[name], 9, [(6, 4), (2, 2), (3, 5), (1, 1)], 4)
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("changes", [{"mlp_ratio": 2.5}, {"mlp_ratio": 4.0}, {"guidance_embeds": False}], ids=str)
def test_other_configurations(world, changes):
    layout = REFERENCE_TABLE["Ulysses-2-TP-4"]
    assert max(world.run(cases.transformer_error, layout, 5, [(4, 4)], 1, **changes)) <= TOLERANCE


@EVERY_LAYOUT
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_text_encoder(world, name, kv_heads):
    errors = world.run(cases.text_encoder_error, REFERENCE_TABLE[name], kv_heads, batch=2, length=11)
    assert max(errors) <= TOLERANCE
