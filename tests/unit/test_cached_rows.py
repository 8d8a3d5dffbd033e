"""The benchmark's batch with a cache for each row does what the cache does with each row alone."""

import pytest
import torch

from benchmarks.cached_rows import CachedRows
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.decision import Evaluation
from parallel_backend.mesh import SINGLE
from tests.distributed.cache_cases import STEPS, inputs_at, new_drift, settings
from tests.distributed.cases import FLUX2, flux2_inputs, tiny_transformer

ROWS = 3


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("head", [1, 3])
def test_rows_are_as_they_are_alone(order, head):
    plan, inputs = settings(order, Fn_compute_blocks=head), flux2_inputs(7, [(5, 7)], ROWS)
    # Rows that drift differently fast, so that their steps are decided differently.
    drift = new_drift(inputs) * torch.tensor([0.1, 1.0, 60.0]).view(ROWS, 1, 1)
    batch = tiny_transformer(num_single_layers=4)
    rows = CachedRows(batch, FLUX2.transformer.block_stacks)
    cache = BlockCache(tiny_transformer(num_single_layers=4), FLUX2.transformer.block_stacks, SINGLE)
    with torch.no_grad():
        rows.begin(plan, ROWS, STEPS)
        together = [batch(**inputs_at(step, inputs, drift)).sample for step in range(STEPS)]
        for row in range(ROWS):
            decisions = []
            for step in range(STEPS):
                cache.plan(plan, Evaluation(str(row), "", float(step), STEPS))
                moved = inputs_at(step, inputs, drift)
                whole = {name: value for name, value in moved.items() if len(value) != ROWS}
                alone = {name: value[row : row + 1] for name, value in moved.items() if len(value) == ROWS}
                out = cache.transformer(**alone, **whole).sample
                torch.testing.assert_close(together[step][row : row + 1], out, rtol=1e-4, atol=1e-4)
                decisions.append(cache.last)
            assert [d.computed for d in decisions] == [step[row].computed for step in rows.decisions]
    assert len(set(rows.computed)) > 1
    rows.begin(None, ROWS, STEPS)
    with torch.no_grad():
        plain = tiny_transformer(num_single_layers=4)(**inputs_at(3, inputs, drift)).sample
        assert torch.equal(batch(**inputs_at(3, inputs, drift)).sample, plain)
