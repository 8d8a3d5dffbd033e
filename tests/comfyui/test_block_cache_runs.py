"""Block Cache on a real server: samplers, streams and other caches; each run is kept apart, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.errors import relative_error

from .cache_graphs import STEPS, add_cache, counts, kept_bytes, runs, sample
from .graphs import (
    Graph,
    NodeId,
    Source,
    add_latent,
    add_loader,
    add_prompt,
    add_sampler,
    save_latent,
)


@pytest.mark.parametrize(
    ("sampler", "positions", "computed"),
    [
        # Heun evaluates a level twice: at the end of a step and at the start of the next one.
        ("heun", [0, 1, 1, 2, 2, 3, 3], 3),
        # DPM2 evaluates between levels too; the last one but one is dropped from its schedule.
        ("dpm_2", [0, ..., 1, ..., 2, ..., 3], 4),
    ],
)
def test_several_evaluations_a_step(server, graph, sampler, positions, computed):
    loader = add_loader(graph)
    options = {"seed": 505, "steps": 4, "sampler_name": sampler}
    cache, exact = (add_cache(graph, (loader, 0), residual_diff_threshold=value) for value in (1.0, 0.0))
    result, (cached, zero, plain) = sample(
        server,
        graph,
        add_sampler(graph, loader, model=cache, **options),
        add_sampler(graph, loader, model=exact, **options),
        add_sampler(graph, loader, **options),
    )
    (run,) = runs(result, cache)
    assert run["steps"] == 4
    for evaluation, position in zip(run["evaluations"], positions, strict=True):
        assert position in (..., evaluation["position"])
    assert [evaluation["position"] for evaluation in run["evaluations"]] == sorted(
        evaluation["position"] for evaluation in run["evaluations"]
    )
    assert run["computed"] == computed
    assert torch.equal(zero, plain)
    assert 0 < relative_error(cached, plain) < 1


def add_custom_sampler(graph: Graph, guider: NodeId, sigmas: Source, latent: Source, noise: bool = True) -> NodeId:
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=506) if noise else graph.add("DisableNoise"),
        guider=guider,
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=sigmas,
        latent_image=latent,
    )


def test_split_sigmas_are_two_runs(server, graph):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    guider = graph.add("BasicGuider", model=cache, conditioning=add_prompt(graph, loader))
    sigmas = graph.add("Flux2Scheduler", steps=9, width=128, height=128)
    split = graph.add("SplitSigmas", sigmas=sigmas, step=5)
    first = add_custom_sampler(graph, guider, (split, 0), add_latent(graph))
    second = add_custom_sampler(graph, guider, (split, 1), (first, 0), noise=False)
    result, _ = sample(server, graph, second)
    assert [(run["steps"], *counts(run)) for run in runs(result, cache)] == [(5, 2, 3, 1), (4, 2, 2, 1)]


def test_rising_sigmas(server, graph):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    guider = graph.add("BasicGuider", model=cache, conditioning=add_prompt(graph, loader))
    flipped = graph.add("FlipSigmas", sigmas=graph.add("Flux2Scheduler", steps=5, width=128, height=128))
    result, _ = sample(server, graph, add_custom_sampler(graph, guider, flipped, add_latent(graph), noise=False))
    (run,) = runs(result, cache)
    assert [evaluation["position"] for evaluation in run["evaluations"]] == [0, 1, 2, 3, 4]
    assert counts(run) == (2, 3, 1)


def test_models_with_other_settings_do_not_mix(server, graph):
    # The second half of each starts from the first half of the other, so that they take turns.
    loader = add_loader(graph)
    options = {"seed": 507, "steps": STEPS}
    caches = [add_cache(graph, (loader, 0), max_warmup_steps=steps) for steps in (2, 5)]
    first = [add_sampler(graph, loader, model=cache, **options) for cache in caches]
    crossed = [
        add_sampler(graph, loader, model=cache, latent_image=latent, denoise=0.5, **options)
        for cache, latent in zip(caches, reversed(first), strict=True)
    ]
    together, latents = sample(server, graph, *crossed)
    for cache, warmup in zip(caches, (2, 5), strict=True):
        assert [counts(run) for run in runs(together, cache)] == [(warmup, STEPS - warmup, 1)] * 2
    assert not torch.equal(*latents)


def test_equal_settings_are_shown_on_their_own_nodes(server, graph):
    loader = add_loader(graph)
    caches = [add_cache(graph, (loader, 0)) for _ in range(2)]
    samplers = [add_sampler(graph, loader, model=cache, seed=508, steps=3 + i) for i, cache in enumerate(caches)]
    result, _ = sample(server, graph, *samplers)
    assert [[run["steps"] for run in runs(result, cache)] for cache in caches] == [[3], [4]]


def test_of_two_in_a_row_the_last_one_counts(server, graph):
    loader = add_loader(graph)
    first = add_cache(graph, (loader, 0))
    last = add_cache(graph, first, max_warmup_steps=3)
    result, _ = sample(server, graph, add_sampler(graph, loader, model=last, steps=4, seed=509))
    assert runs(result, first) == []
    assert [counts(run) for run in runs(result, last)] == [(3, 1, 1)]


def test_batch(server, graph):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    latent = add_latent(graph, batch_size=2)
    result, (cached, plain) = sample(
        server,
        graph,
        *(add_sampler(graph, loader, model=m, latent_image=latent, seed=510, steps=4) for m in (cache, (loader, 0))),
    )
    assert counts(runs(result, cache)[0]) == (2, 2, 1)
    assert 0 < relative_error(cached, plain) < 1


def test_conditionings_in_one_call_are_one_stream_and_apart_they_are_two(server, graph):
    loader = add_loader(graph)
    negative = add_prompt(graph, loader, "blurry, low quality")
    caches = [add_cache(graph, (loader, 0)) for _ in range(2)]
    # ComfyUI batches conditionings of one kind; a reference makes them two kinds.
    referring = graph.add("ReferenceLatent", conditioning=add_prompt(graph, loader), latent=add_latent(graph, 64, 64))
    positives = (add_prompt(graph, loader), referring)
    result, _ = sample(
        server,
        graph,
        *(
            add_sampler(graph, loader, model=cache, positive=positive, negative=negative, cfg=2.0, seed=511, steps=4)
            for cache, positive in zip(caches, positives, strict=True)
        ),
    )
    assert [counts(runs(result, cache)[0]) for cache in caches] == [(2, 2, 1), (4, 4, 2)]


def test_regions_are_streams(server, graph):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    regions = [
        graph.add("ConditioningSetArea", conditioning=prompt, width=width, height=128, x=x, y=0, strength=1.0)
        for prompt, width, x in (
            (add_prompt(graph, loader), 64, 0),
            (add_prompt(graph, loader, "a castle on a hill at sunset"), 96, 32),
        )
    ]
    both = graph.add("ConditioningCombine", conditioning_1=regions[0], conditioning_2=regions[1])
    result, _ = sample(server, graph, add_sampler(graph, loader, model=cache, positive=both, seed=512, steps=5))
    assert counts(runs(result, cache)[0]) == (4, 6, 2)


def test_a_conditioning_that_ends_mid_run(server, graph):
    # While both are on, ComfyUI batches them; the one that is left is a stream of its own, computed at first.
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    early = graph.add("ConditioningSetTimestepRange", conditioning=add_prompt(graph, loader), start=0.0, end=0.5)
    both = graph.add("ConditioningCombine", conditioning_1=early, conditioning_2=add_prompt(graph, loader, "a bird"))
    result, _ = sample(server, graph, add_sampler(graph, loader, model=cache, positive=both, seed=513, steps=STEPS))
    (run,) = runs(result, cache)
    begins = [e["position"] for e in run["evaluations"] if e["reason"] == "nothing cached yet"]
    assert run["streams"] == len(begins) == 2
    assert begins[0] == 0 < begins[1]
    assert len(run["evaluations"]) == STEPS


def test_windows_of_one_conditioning_are_streams(server, graph):
    # Each step calls the model three times with the same conditioning, for other rows of the latent.
    loader = add_loader(graph)
    windows = graph.add(
        "ContextWindowsManual",
        model=(loader, 0),
        context_length=4,
        context_overlap=2,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        dim=2,
        freenoise=False,
        cond_retain_index_list="",
        latent_retain_index_list="",
        split_conds_to_windows=False,
        causal_window_fix=False,
    )
    cache = add_cache(graph, windows)
    options = {"seed": 519, "steps": 4}
    result, (cached, plain) = sample(
        server, graph, *(add_sampler(graph, loader, model=model, **options) for model in (cache, windows))
    )
    assert counts(runs(result, cache)[0]) == (6, 6, 3)
    assert 0 < relative_error(cached, plain) < 1


def test_another_resolution_and_img2img(server, graph):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    small = add_sampler(graph, loader, model=cache, seed=514, steps=4)
    large = graph.add("LatentUpscaleBy", samples=small, upscale_method="bilinear", scale_by=1.5)
    refined = add_sampler(graph, loader, model=cache, latent_image=large, denoise=0.5, seed=515, steps=6)
    result, (latent,) = sample(server, graph, refined)
    assert latent.shape[2:] == (12, 12)
    assert [(run["steps"], *counts(run)) for run in runs(result, cache)] == [(4, 2, 2, 1), (6, 2, 4, 1)]
    assert [e["position"] for e in runs(result, cache)[1]["evaluations"]] == [0, 1, 2, 3, 4, 5]


def test_another_cache_is_named_once(server, graph):
    loader = add_loader(graph)
    options = {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    # Also where two Block Caches follow: the first one has no run.
    cache = add_cache(graph, add_cache(graph, graph.add("EasyCache", model=(loader, 0), **options)))
    before = server.log_text().count("EasyCache and Block Cache")
    result, _ = sample(server, graph, add_sampler(graph, loader, model=cache, seed=516, steps=4))
    assert server.log_text().count("EasyCache and Block Cache") == before + 1
    assert any(node == str(cache) and "EasyCache and Block Cache" in text for node, text in result.texts)


def at_progress_of(node: NodeId, action: Callable[[], None], value: int) -> Callable[[dict[str, Any]], None]:
    """An ``on_message`` that acts once, as soon as ``node`` has come to step ``value``."""
    done = []

    def on_message(message: dict[str, Any]) -> None:
        if message["type"] == "progress_state" and not done:
            progress = message["data"]["nodes"].get(str(node))
            if progress is not None and progress["value"] >= value:
                done.append(True)
                action()

    return on_message


def test_cancel(server):
    cancelled, graph = Graph(), Graph()
    loader = add_loader(cancelled)
    cache = add_cache(cancelled, (loader, 0))
    sampler = add_sampler(cancelled, loader, model=cache, steps=400, seed=517)
    save_latent(cancelled, sampler)
    result = server.run(cancelled, on_message=at_progress_of(sampler, server.interrupt, value=4))
    assert result.interrupted
    assert result.error is None
    assert [run["steps"] for run in runs(result, cache)] == [400]
    assert set(kept_bytes(server)[0]) == {0}

    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0))
    result, _ = sample(server, graph, add_sampler(graph, loader, model=cache, steps=4, seed=518))
    assert [counts(run) for run in runs(result, cache)] == [(2, 2, 1)]
    text = [text for node, text in result.texts if node == str(cache)][-1]
    assert text.startswith("2 computed, 2 cached, about ")
