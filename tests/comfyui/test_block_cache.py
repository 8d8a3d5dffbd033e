"""Block Cache on a real server: what it leaves alone, what it caches, and how runs are kept apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from .graphs import (
    Graph,
    NodeId,
    Source,
    add_latent,
    add_loader,
    add_prompt,
    add_reference,
    add_sampler,
    relative_error,
    run_well,
    save_latent,
    saved_latent,
)
from .processes import worker_ranks
from .server import ComfyServer, RunResult
from .test_errors import failure, rejection
from .test_lifecycle import at_progress_of

STEPS = 8
FIELDS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
"""For the tiny model's five blocks: whatever may be cached after two steps is."""


def add_cache(graph: Graph, model: Source, preset: str = "custom", **changes: Any) -> NodeId:
    """A Block Cache with FIELDS and what differs from them."""
    fields = {f"preset.{name}": value for name, value in {**FIELDS, **changes}.items()} if preset == "custom" else {}
    return graph.add("HybridDiT_BlockCache", model=model, preset=preset, **fields)


def runs(result: RunResult, node: NodeId) -> list[dict[str, Any]]:
    """The finished runs that were shown on a Block Cache node, in order."""
    sent = [m["data"] for m in result.messages if m["type"] == "hybrid_dit.block_cache"]
    return [run for run in sent if run["node"] == str(node) and not run["running"]]


def counts(run: dict[str, Any]) -> tuple[int, int, int]:
    return run["computed"], run["cached"], run["streams"]


def kept_bytes(server: ComfyServer, **layout: Any) -> tuple[list[int], dict[str, Any]]:
    """What each rank's cache keeps, and the last run's part of the report."""
    graph = Graph()
    node = graph.add("HybridDiT_WorkersReport", model=(add_loader(graph, **layout), 0))
    report = json.loads(run_well(server, graph).outputs[str(node)]["text"][0])
    return [rank["cache_bytes"] for rank in report["ranks"]], report["cache"]


@pytest.fixture
def graph() -> Graph:
    return Graph()


def sample(server: ComfyServer, graph: Graph, *samples: Source) -> tuple[RunResult, list[torch.Tensor]]:
    """Run the graph; its result and those latents. No rank keeps anything of it."""
    saves = [save_latent(graph, source) for source in samples]
    result = run_well(server, graph)
    assert set(kept_bytes(server)[0]) == {0}
    return result, [saved_latent(server, result, save) for save in saves]


def test_without_the_node_or_with_threshold_0_the_picture_is_the_uncached_one(server, graph):
    loader = add_loader(graph)
    options = {"seed": 501, "steps": STEPS}
    exact = add_cache(graph, (loader, 0), residual_diff_threshold=0.0)
    cache = add_cache(graph, (loader, 0))
    result, (before, zero, cached, after) = sample(
        server,
        graph,
        add_sampler(graph, loader, **options),
        add_sampler(graph, loader, model=exact, **options),
        add_sampler(graph, loader, model=cache, **options),
        # Another node, or ComfyUI would not compute it again.
        add_sampler(graph, loader, **options, positive=add_prompt(graph, loader)),
    )
    assert torch.equal(before, zero)
    assert torch.equal(before, after)
    assert 1e-4 < relative_error(cached, before) < 1
    assert [counts(run) for run in runs(result, exact)] == [(STEPS, 0, 1)]
    assert [counts(run) for run in runs(result, cache)] == [(2, STEPS - 2, 1)]


def test_thresholds_change_without_reloading(server):
    ranks = None
    for seen, threshold in enumerate((0.0, 1.0)):
        graph = Graph()
        loader = add_loader(graph)
        cache = add_cache(graph, (loader, 0), residual_diff_threshold=threshold)
        result, _ = sample(server, graph, add_sampler(graph, loader, model=cache, steps=STEPS, seed=502))
        assert [counts(run)[1] for run in runs(result, cache)] == [(STEPS - 2) * seen]
        if seen:
            assert str(loader) in result.cached_nodes()
            assert worker_ranks(server) == ranks
        ranks = worker_ranks(server)


def test_custom_values_arrive(server, graph):
    fields = {
        "Fn_compute_blocks": 2,
        "Bn_compute_blocks": 1,
        "residual_diff_threshold": 0.9,
        "max_warmup_steps": 3,
        "warmup_interval": 2,
        "max_cached_steps": 5,
        "max_continuous_cached_steps": 4,
        "max_accumulated_residual_diff_threshold": 7.5,
        "steps_computation_mask": "1 0 1 0",
        "steps_computation_policy": "static",
    }
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0), **fields, taylorseer_order=2)
    sample(server, graph, add_sampler(graph, loader, model=cache, steps=4, seed=503))
    settings = kept_bytes(server)[1]["settings"]
    fields["steps_computation_mask"] = [1, 0, 1, 0]
    assert settings == {
        "config": {**fields, "num_inference_steps": None},
        "calibrator": {"taylorseer_order": 2},
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Fn_compute_blocks": 0}, "DBCacheConfig.Fn_compute_blocks must be a whole number of at least 1; got 0"),
        ({"residual_diff_threshold": 1.5}, "residual_diff_threshold must be between 0 and 1; got 1.5"),
        ({"max_accumulated_residual_diff_threshold": -1.0}, "must be at least 0; got -1.0"),
        ({"taylorseer_order": 5}, "taylorseer_order must be 1, 2, 3 or 4; got 5"),
        ({"steps_computation_mask": "quick"}, "a step mask is one of slow, medium, fast, ultra or ones and zeros"),
        ({"steps_computation_policy": "sometimes"}, "steps_computation_policy must be 'dynamic' or 'static'"),
        ({"preset": "best"}, "preset must be one of quality, speed, custom"),
    ],
)
def test_wrong_values_are_refused(server, graph, fields, message):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0), **fields)
    graph[str(cache)]["inputs"] |= {"preset": fields.pop("preset", "custom")}
    save_latent(graph, add_sampler(graph, loader, model=cache))
    text = rejection(server, graph, cache)
    assert message in text
    assert text.count(message) == 1


def test_linked_values_are_accepted(server, graph):
    loader = add_loader(graph)
    number = graph.add("PrimitiveFloat", value=0.0)
    cache = add_cache(graph, (loader, 0), residual_diff_threshold=(number, 0))
    result, _ = sample(server, graph, add_sampler(graph, loader, model=cache, steps=4, seed=504))
    assert [counts(run) for run in runs(result, cache)] == [(4, 0, 1)]


def test_too_few_blocks(server, graph):
    loader = add_loader(graph)
    cache = add_cache(graph, (loader, 0), "quality")
    save_latent(graph, add_sampler(graph, loader, model=cache))
    assert "Fn_compute_blocks=8 and Bn_compute_blocks=0 leave nothing to skip: this MODEL has 5 blocks" in failure(
        server, graph, cache
    )


def test_other_models_are_refused(server, graph):
    reference = add_reference(graph)
    cache = add_cache(graph, (reference, 0))
    save_latent(graph, add_sampler(graph, reference, model=cache))
    assert "does not come from a parallel loader" in failure(server, graph, cache)


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
