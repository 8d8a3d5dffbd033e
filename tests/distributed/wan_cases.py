"""What the ranks of the test world run for Wan: against the untouched model of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import WanTransformer3DModel

from parallel_backend.blocks import double_stream
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import PRESETS, CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, family_of_name
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallelize import disable_cache, forget_values, parallelize_transformer
from tests.distributed.cases import in_pieces
from tests.distributed.qwen_cases import sharpen
from tests.errors import relative_error

WAN = family_of_name("wan").transformer
TEXT, IMAGE = 40, 24
HEADS, HEAD_DIM = 8, 16


class Case(NamedTuple):
    """A video: positions of its latent, how many, tokens of the text and of the image, and timesteps."""

    size: tuple[int, int, int]
    batch: int = 1
    text: int = 512
    image: int = 0
    timesteps: tuple[float, ...] = ()
    """Of the frames of each sample; empty: one for all."""


def tiny_transformer(**changes: Any) -> WanTransformer3DModel:
    """Wan with 8 heads of 16 and 3 blocks; its MLP has 208 features, in units of 16 of which no two,
    four or eight ranks have as many."""
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "ffn_dim": 208, "num_layers": 3, "text_dim": TEXT,
        "freq_dim": 32,
    }  # fmt: skip
    model = WanTransformer3DModel(**{**sizes, **changes})
    sharpen(model)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # nothing that is 1 or 0 everywhere
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return model.eval()


def inputs_of(model: WanTransformer3DModel, case: Case) -> dict[str, Any]:
    """Arguments of diffusers' transformer."""
    generator = torch.Generator().manual_seed(1)
    frames, height, width = case.size
    timestep: Any = torch.linspace(900, 300, case.batch)
    if case.timesteps:  # diffusers takes one for each token
        of_frames = torch.tensor(case.timesteps).view(case.batch, frames)
        timestep = of_frames.repeat_interleave(height // 2 * (width // 2), dim=1)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(case.batch, *sizes, generator=generator)

    found = {
        "hidden_states": random(model.config.in_channels, *case.size),
        "timestep": timestep,
        "encoder_hidden_states": random(case.text, TEXT),
    }
    if case.image:
        found["encoder_hidden_states_image"] = random(case.image, IMAGE)
    return found


@in_pieces
def transformer_errors(
    mesh: ParallelMesh, layout: ParallelismConfig, cases: Sequence[Case], **changes: Any
) -> list[float]:
    """Relative errors of the parallel transformer against the untouched one, of each sample of several cases.

    One model computes them all, and all again in the end: nothing may linger but what is right. What is kept of the
    conditionings is less than they have together.
    """
    model = tiny_transformer(**changes)
    inputs = [inputs_of(model, case) for case in cases]
    expected = [model(**one).sample for one in inputs]
    errors = []
    with patch.object(double_stream, "TILE", 2):  # row-parallel outputs come in two pieces
        parallelize_transformer(model, WAN, layout, mesh)
        for _ in range(2):
            for one, wanted in zip(inputs, expected, strict=True):
                actual = model(**one).sample
                errors += [relative_error(a, b) for a, b in zip(actual, wanted, strict=True)]
    return errors


def frames_error(mesh: ParallelMesh, layout: ParallelismConfig, case: Case) -> tuple[float, int]:
    """Relative error where timesteps are of frames, as ComfyUI has them; and the rows that the MLPs for them had."""
    model = tiny_transformer()
    inputs = inputs_of(model, case)
    expected = model(**inputs).sample
    parallelize_transformer(model, WAN, layout, mesh)
    inputs["timestep"] = torch.tensor(case.timesteps).view(case.batch, -1)
    rows: list[int] = []
    hook = model.condition_embedder.time_embedder.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    error = relative_error(model(**inputs).sample, expected)
    hook.remove()
    return error, rows[0]


def undone_error(mesh: ParallelMesh, layout: ParallelismConfig) -> float:
    """Relative error of a model that was parallel for a time; on each rank by itself."""
    model = tiny_transformer()
    inputs = inputs_of(model, Case((3, 6, 4)))
    expected = model(**inputs).sample
    parallelize_transformer(model, WAN, layout, mesh)
    model(**inputs)
    disable_cache(model)
    return relative_error(model(**inputs).sample, expected)


def kept_keys(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, Any]:
    """How often a block made keys of a conditioning, and what is kept of how many bytes."""
    model = tiny_transformer()
    parallelize_transformer(model, WAN, layout, mesh)
    entrance = model._hybrid_parallel.hooks[0]
    made: list[int] = []
    for block in model.blocks:
        block.attn2.to_v.register_forward_hook(lambda *_: made.append(1))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 16, 2, 4, 4, generator=generator)
    contexts = [torch.randn(1, 512, TEXT, generator=generator) for _ in range(5)]
    counts, timestep = [], torch.tensor([500.0])

    def evaluate(context: torch.Tensor) -> torch.Tensor:
        return model(x, timestep, context, return_dict=False)[0]

    for context in (contexts[0], contexts[1], contexts[0], contexts[1], *contexts[2:], contexts[0]):
        evaluate(context)
        counts.append(len(made))
    nbytes = entrance.keys.nbytes()
    before = evaluate(contexts[4])
    model.blocks[1].attn2.to_k.weight.data.mul_(3.0)
    stale = evaluate(contexts[4])
    forget_values(model)
    after = entrance.keys.nbytes(), evaluate(contexts[4])
    long = torch.randn(5, 512, TEXT, generator=generator)
    held = entrance.keys.nbytes()
    model(x.expand(5, -1, -1, -1, -1), timestep, long)
    return {
        "made": counts, "nbytes": nbytes, "forgotten": after[0], "changed": relative_error(after[1], before),
        "stale": relative_error(stale, before), "grown": entrance.keys.nbytes() - held,
    }  # fmt: skip


def cached_run(mesh: ParallelMesh, layout: ParallelismConfig) -> tuple[list[bool], list[torch.Tensor]]:
    """Which steps of a run were computed, and the predictions of its steps; a latent of odd sides."""
    model = tiny_transformer()
    parallelize_transformer(model, WAN, layout, mesh)
    cache = BlockCache(model, WAN.block_stacks, mesh.world, WAN.picture_tokens)
    settings = CacheSettings(
        DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=1, residual_diff_threshold=0.3, max_warmup_steps=2)
    )
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 16, 3, 9, 5, generator=generator)
    conditioning = Conditioning(torch.randn(2, 20, TEXT, generator=generator))
    computed, predictions = [], []
    for step in range(8):
        cache.plan(settings, Evaluation("run", "cond", step, 8))
        timestep = torch.full((2,), 800 - step / 4)  # sharpened weights make much of little
        prediction = WAN.evaluate(model, WAN.inputs(x, timestep, conditioning), x)
        assert cache.last is not None
        computed.append(cache.last.computed)
        predictions.append(prediction)
        x = x - prediction / 4000
    return computed, predictions


def preset_runs(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, tuple[int, int, float]]:
    """Two experts in turn, 10 of 20 steps each, as in ComfyUI's template: what presets leave out of each, and what it
    costs: the relative error of the latent against that without a cache.

    Random weights, but calm ones: what a step predicts changes with the timestep as little as a trained model's does.
    """
    experts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = tiny_transformer(num_layers=6)
        for name, parameter in model.named_parameters():
            if name.startswith(("proj_out", "condition_embedder.time_proj")) or ".to_q." in name:
                parameter.data.mul_(0.02 if "time_proj" in name else 0.1)
            if seed:  # another expert
                parameter.data.add_(torch.randn_like(parameter) * 0.1 * parameter.data.std(correction=0))
        parallelize_transformer(model, WAN, layout, mesh)
        experts.append((model, BlockCache(model, WAN.block_stacks, mesh.world, WAN.picture_tokens)))
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
    conditioning = Conditioning(torch.randn(1, 20, TEXT, generator=generator))
    linear = torch.linspace(1, 0, 21)
    sigmas = 5 * linear / (1 + 4 * linear)

    def draw(presets: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        x, cached = noise, []
        for half, (model, cache) in enumerate(experts):
            cached.append(0)
            for step in range(10):
                sigma, following = sigmas[10 * half + step], sigmas[10 * half + step + 1]
                if presets:
                    cache.plan(PRESETS[presets[half]], Evaluation(f"{presets}{half}", "cond", step, 10))
                prediction = WAN.evaluate(model, WAN.inputs(x, 1000 * sigma.view(1), conditioning), x)
                if presets:
                    assert cache.last is not None
                    cached[-1] += not cache.last.computed
                x = x + (following - sigma) * prediction
        return x, cached

    expected, _ = draw(())
    found = {}
    for pair in (("high_noise", "low_noise"), ("quality", "quality"), ("speed", "speed")):
        x, cached = draw(pair)
        found[pair[0]] = cached[0], cached[1], relative_error(x, expected)
    return found
