"""FLUX.2's processors on one rank: the untouched model's numbers, and a refusal of what they would have to ignore."""

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.mesh import single_mesh
from parallel_backend.parallelize import disable_cache, parallelize_transformer
from tests.distributed.cases import FLUX2, flux2_inputs, tiny_transformer
from tests.errors import relative_error


@pytest.fixture
def transformer():
    model = tiny_transformer()
    parallelize_transformer(model, FLUX2.transformer, ParallelismConfig(), single_mesh("cpu"))
    return model


@torch.no_grad()
def test_one_rank_computes_what_the_untouched_model_does(transformer):
    inputs = flux2_inputs(7, [(5, 3), (2, 2)], 2)
    expected = tiny_transformer()(**inputs).sample
    # fp32: the same operations but for the order inside the attention kernel.
    assert relative_error(transformer(**inputs).sample, expected) <= 1e-6
    disable_cache(transformer)
    assert torch.equal(transformer(**inputs).sample, expected)


@torch.no_grad()
def test_what_cannot_be_honoured_is_refused(transformer):
    inputs = flux2_inputs(7, [(5, 3), (2, 2)], 1)
    with pytest.raises(ValueError, match="call it without kv_cache"):
        transformer(**inputs, kv_cache_mode="extract", num_ref_tokens=4)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        transformer(**inputs, joint_attention_kwargs={"attention_mask": torch.ones(1, 26, dtype=torch.bool)})
