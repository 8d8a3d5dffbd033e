"""Our MODEL and CLIP against ComfyUI's own FLUX.2 with the same weights: the same graph has to give the same latent."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
from torch import Tensor

from tests.errors import relative_error

from .conftest import EXAMPLE_IMAGE
from .graphs import (
    Graph,
    NodeId,
    add_latent,
    add_loader,
    add_prompt,
    add_reference,
    add_sampler,
    latents_of_both,
    run_well,
    save_latent,
    saved_latent,
)
from .server import ComfyServer

TOLERANCE = 1e-4
"""Of the relative error. Both sides compute in float32 but add in another order; sampling and the sharp attention of
the test weights amplify that (measured: 7e-6 at most). A wrong position, mask or reference gives 1e-2 and more."""

DIFFERENT = 1e-2
"""Cases differ from each other by at least this: what a case is about has reached the latent."""

Build = Callable[[Graph, NodeId], NodeId]
CASES: dict[str, Build] = {}
SHAPES = {"batch": (3, 128, 8, 8), "odd_size": (1, 128, 17, 13)}
LAYOUTS = {"ulysses_ring": {"ulysses": 2, "ring": 2, "tp": 1}}
"""Cases that run on another layout than the shared one."""


def case(build: Build) -> Build:
    CASES[build.__name__] = build
    return build


@case
def euler(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader)


@case
def heun(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, sampler_name="heun", steps=3)


@case
def dpmpp_2m(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, sampler_name="dpmpp_2m", steps=4)


@case
def batch(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, latent_image=add_latent(graph, batch_size=3))


@case
def odd_size(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, latent_image=add_latent(graph, 208, 272))


@case
def two_references(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, positive=_with_references(graph, loader, (96, 64), (48, 80)))


@case
def two_references_swapped(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, positive=_with_references(graph, loader, (48, 80), (96, 64)))


@case
def two_regions(graph: Graph, loader: NodeId) -> NodeId:
    halves = []
    for x, text in ((0, "a cat sitting on a wooden table"), (64, "a castle on a hill at sunset")):
        full = graph.add("SolidMask", value=1.0, width=128, height=128)
        nothing = graph.add("SolidMask", value=0.0, width=64, height=128)
        mask = graph.add("MaskComposite", destination=full, source=nothing, x=x, y=0, operation="multiply")
        conditioning = add_prompt(graph, loader, text)
        halves.append(
            graph.add(
                "ConditioningSetMask", conditioning=conditioning, mask=mask, strength=1.0, set_cond_area="default"
            )
        )
    both = graph.add("ConditioningCombine", conditioning_1=halves[0], conditioning_2=halves[1])
    return add_sampler(graph, loader, positive=both)


@case
def cfg_with_negative(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, cfg=3.0, negative=add_prompt(graph, loader, "blurry, low quality"))


@case
def guidance(graph: Graph, loader: NodeId) -> NodeId:
    positive = graph.add("FluxGuidance", conditioning=add_prompt(graph, loader), guidance=9.0)
    return add_sampler(graph, loader, positive=positive)


@case
def split_sigmas(graph: Graph, loader: NodeId) -> NodeId:
    guider = graph.add("BasicGuider", model=(loader, 0), conditioning=add_prompt(graph, loader))
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    split = graph.add("SplitSigmas", sigmas=graph.add("Flux2Scheduler", steps=5, width=128, height=128), step=2)
    shared = {"guider": guider, "sampler": sampler}
    first = graph.add(
        "SamplerCustomAdvanced",
        **shared,
        noise=graph.add("RandomNoise", noise_seed=1),
        sigmas=(split, 0),
        latent_image=add_latent(graph),
    )
    return graph.add(
        "SamplerCustomAdvanced",
        **shared,
        noise=graph.add("DisableNoise"),
        sigmas=(split, 1),
        latent_image=(first, 0),
    )


@case
def model_sampling_flux(graph: Graph, loader: NodeId) -> NodeId:
    model = graph.add("ModelSamplingFlux", model=(loader, 0), max_shift=1.15, base_shift=0.5, width=128, height=128)
    return add_sampler(graph, loader, model=model)


@case
def long_prompt(graph: Graph, loader: NodeId) -> NodeId:
    # 600 words are at least 600 tokens: more than the 512 that ComfyUI fills shorter texts up to.
    return add_sampler(graph, loader, positive=add_prompt(graph, loader, "red circle blue " * 200))


@case
def empty_prompt(graph: Graph, loader: NodeId) -> NodeId:
    return add_sampler(graph, loader, positive=add_prompt(graph, loader, ""))


@case
def ulysses_ring(graph: Graph, loader: NodeId) -> NodeId:
    positive = _with_references(graph, loader, (48, 80))
    return add_sampler(graph, loader, positive=positive, cfg=2.0, negative=add_prompt(graph, loader, "blurry"))


def _with_references(graph: Graph, loader: NodeId, *sizes: tuple[int, int]) -> NodeId:
    """The prompt with references cut from the example image, encoded by the reference's VAE for both sides."""
    conditioning = add_prompt(graph, loader)
    image, encoder = graph.add("LoadImage", image=EXAMPLE_IMAGE), add_reference(graph)
    for width, height in sizes:
        cut = graph.add("ImageCrop", image=image, width=width, height=height, x=40, y=56)
        latent = graph.add("VAEEncode", pixels=cut, vae=(encoder, 2))
        conditioning = graph.add("ReferenceLatent", conditioning=conditioning, latent=latent)
    return conditioning


@pytest.fixture(scope="module")
def latents(server: ComfyServer) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Case -> (our latent, the reference's); each case runs once."""
    return functools.cache(lambda name: latents_of_both(server, CASES[name], **LAYOUTS.get(name, {})))


# The other layout comes last: a group more would end the shared one.
@pytest.mark.parametrize("name", sorted(CASES, key=LAYOUTS.__contains__))
def test_same_latent(name, latents):
    ours, reference = latents(name)
    assert tuple(reference.shape) == SHAPES.get(name, (1, 128, 8, 8))
    assert reference.std() > 0.1
    assert relative_error(ours, reference) <= TOLERANCE


def test_cases_differ(latents):
    """Proof that the comparison can fail: no case gives the latent of another one."""
    alike = {
        pair: error
        for pair in itertools.combinations(CASES, 2)
        if latents(pair[0])[0].shape == latents(pair[1])[1].shape
        and (error := relative_error(latents(pair[0])[0], latents(pair[1])[1])) < DIFFERENT
    }
    assert not alike


def test_images_of_a_batch_differ(latents):
    first, second, third = latents("batch")[0].split(1)
    assert relative_error(first, second) > DIFFERENT
    assert relative_error(second, third) > DIFFERENT


def test_conditionings_that_do_not_fit_together_are_evaluated_one_by_one(server):
    """Two pictures with two prompts of one length: what ComfyUI puts into one call."""
    latents = []
    for little in (False, True):
        graph = Graph()
        loader = add_loader(graph)
        model = graph.add("ReferenceLittleRoom", model=(loader, 0)) if little else (loader, 0)
        options = {
            "cfg": 2.0,
            "negative": add_prompt(graph, loader, "blurry"),
            "latent_image": add_latent(graph, batch_size=2),
        }
        latent = save_latent(graph, add_sampler(graph, loader, model=model, **options))
        latents.append(saved_latent(server, run_well(server, graph), latent))
    assert "a batch of 4 is too large; its 2 conditionings are evaluated one after the other" in server.log_text()
    assert relative_error(latents[1], latents[0]) <= TOLERANCE
