"""Block Cache on a real server: what it leaves alone, what reaches the workers, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.errors import relative_error

from .cache_graphs import STEPS, add_cache, counts, kept_bytes, runs, sample
from .graphs import (
    Graph,
    add_loader,
    add_prompt,
    add_reference,
    add_sampler,
    save_latent,
)
from .processes import worker_ranks
from .test_errors import failure, rejection


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
        ({"preset": "best"}, "preset must be one of quality, speed, high_noise, low_noise, custom"),
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
    cache = add_cache(graph, (loader, 0), Fn_compute_blocks=8)
    save_latent(graph, add_sampler(graph, loader, model=cache))
    assert "Fn_compute_blocks=8 and Bn_compute_blocks=0 leave nothing to skip: this MODEL has 5 blocks" in failure(
        server, graph, cache
    )


def test_other_models_are_refused(server, graph):
    reference = add_reference(graph)
    cache = add_cache(graph, (reference, 0))
    save_latent(graph, add_sampler(graph, reference, model=cache))
    assert "does not come from a parallel loader" in failure(server, graph, cache)
