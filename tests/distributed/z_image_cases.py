"""What the ranks of the test world run for Z-Image: against the untouched model of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel

from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, family_of_name
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallelize import disable_cache, parallelize_transformer
from tests.distributed.qwen_cases import sharpen
from tests.errors import relative_error

Z_IMAGE = family_of_name("z_image").transformer
CONTEXT = 40


def tiny_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """Z-Image with 6 heads of 16 and 3 blocks; its MLP has 256 features, which do not divide over 3."""
    torch.manual_seed(0)
    sizes = {"dim": 96, "n_layers": 3, "n_heads": 6, "n_kv_heads": 6, "cap_feat_dim": CONTEXT, "axes_dims": [4, 6, 6]}
    model = ZImageTransformer2DModel(**{**sizes, **changes})
    sharpen(model)
    return model.eval()


def inputs_of(shapes: list[tuple[int, tuple[int, int]]]) -> dict[str, Any]:
    """Arguments of diffusers' transformer for a batch: numbers of text tokens, and heights and widths of latents."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": [torch.randn(16, 1, *size, generator=generator) for _, size in shapes],
        "t": torch.linspace(0.3, 0.8, len(shapes)),
        "cap_feats": [torch.randn(text, CONTEXT, generator=generator) for text, _ in shapes],
    }


def transformer_errors(mesh: ParallelMesh, layout: ParallelismConfig, batches: list[Any]) -> list[float]:
    """Relative errors of the parallel transformer against the untouched one, of each sample of several batches.

    One model computes them all, and the first again at the end: nothing may linger from one forward to the next.
    """
    model, inputs = tiny_transformer(), [inputs_of(batch) for batch in batches]
    expected = [model(**one).sample for one in inputs]
    parallelize_transformer(model, Z_IMAGE, layout, mesh)
    again = zip([*inputs, inputs[0]], [*expected, expected[0]], strict=True)
    pairs = [pair for one, wanted in again for pair in zip(model(**one).sample, wanted, strict=True)]
    return [relative_error(actual, wanted) for actual, wanted in pairs]


def undone_error(mesh: ParallelMesh, layout: ParallelismConfig) -> float:
    """Relative error of a model that was parallel for a time; on each rank by itself."""
    model, inputs = tiny_transformer(), inputs_of([(5, (6, 4))])
    expected = model(**inputs).sample[0]
    parallelize_transformer(model, Z_IMAGE, layout, mesh)
    model(**inputs)
    disable_cache(model)
    return relative_error(model(**inputs).sample[0], expected)


def cached_run(mesh: ParallelMesh, layout: ParallelismConfig) -> tuple[list[bool], list[torch.Tensor]]:
    """Which steps of a run were computed, and the predictions of its steps; odd latents, 20 text tokens."""
    model = tiny_transformer()
    parallelize_transformer(model, Z_IMAGE, layout, mesh)
    cache = BlockCache(model, Z_IMAGE.block_stacks, mesh.world, Z_IMAGE.picture_tokens)
    settings = CacheSettings(
        DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, residual_diff_threshold=0.3, max_warmup_steps=2)
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 9, 5, generator=generator)
    conditioning = Conditioning(torch.randn(1, 20, CONTEXT, generator=generator))
    computed, predictions = [], []
    for step in range(8):
        cache.plan(settings, Evaluation("run", "cond", step, 8))
        sigma = torch.full((2,), 0.8 - step / 4000)  # sharpened weights make much of little
        prediction = Z_IMAGE.evaluate(model, Z_IMAGE.inputs(x, sigma, conditioning), x)
        assert cache.last is not None
        computed.append(cache.last.computed)
        predictions.append(prediction)
        x = x - prediction / 4000
    return computed, predictions
