"""What cannot work is refused on the node that caused it, with the remedy, and leaves the server as good as before."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import relative_error

from .conftest import EXAMPLE_IMAGE, TRUNCATED, UNSUPPORTED
from .graphs import (
    Graph,
    NodeId,
    add_layout,
    add_loader,
    add_prompt,
    add_sampler,
    assert_still_draws,
    latents_of_both,
    save_latent,
)
from .lora_files import write_tiny_lora
from .processes import group_processes
from .server import ComfyServer, PromptRejected
from .test_model import TOLERANCE


@pytest.fixture(scope="module", autouse=True)
def _still_draws_after_it(server: ComfyServer) -> Iterator[None]:
    """After all of them, in the process and the workers that have refused them."""
    process = server.process
    yield
    assert server.process is process
    assert_still_draws(server)


def rejection(server: ComfyServer, graph: Graph, node: NodeId) -> str:
    """The text on ``node``, which alone has one, and one alone, of a graph that is refused when it is queued."""
    with pytest.raises(PromptRejected) as caught:
        server.run(graph)
    errors = caught.value.node_errors
    assert set(errors) == {str(node)}
    (error,) = errors[str(node)]["errors"]
    return f"{error['message']}: {error['details']}"


def failure(server: ComfyServer, graph: Graph, node: NodeId) -> str:
    """The text of the error that ``node`` raises when the graph runs."""
    result = server.run(graph)
    error = result.error
    assert error is not None, "the graph ran"
    assert error["node_id"] == str(node), error["exception_message"]
    # ComfyUI puts it before the text, and users need no path of Python modules there.
    assert "." not in error["exception_type"]
    return error["exception_message"]


def sampled(graph: Graph, loader: NodeId, **options) -> NodeId:
    """Adds a sampler with an output node behind it; the sampler."""
    sampler = add_sampler(graph, loader, **options)
    save_latent(graph, sampler)
    return sampler


# --- when the graph is queued ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        # Numbers that no machine has, so that it is the same on one with GPUs.
        ({"devices": "97,98", "ulysses": 2, "tp": 1}, ["GPU 97, 98", r"this machine has \d+ GPU"]),
        ({"devices": "the first two"}, ["cannot read the device 'the first two'", "write 'auto', 'cpu', or GPUs"]),
        ({"ulysses": 0}, ["ulysses", "0"]),
        ({"ring": 0}, ["ring", "0"]),
        ({"tp": -1}, ["tp", "-1"]),
    ],
    ids=["absent GPUs", "unreadable devices", "ulysses 0", "ring 0", "tp -1"],
)
def test_layout_is_refused_at_once(layout, words, server):
    graph = Graph()
    node = add_layout(graph, **layout)
    sampled(graph, graph.add("HybridDiT_LoadPipeline", pipeline="tiny", layout=node))
    text = rejection(server, graph, node)
    for word in words:
        assert re.search(word, text), text


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (TRUNCATED, [rf"{TRUNCATED}/transformer/\S*\.safetensors"]),
        (UNSUPPORTED, ["StableCascadePipeline", "Flux2Pipeline"]),
        ("no-such-folder", ["no pipeline folder 'no-such-folder'"]),
        ("../home", ["'../home' is not the name of a pipeline folder"]),
    ],
)
def test_pipeline_is_refused_at_once(pipeline, words, server):
    before = group_processes(server)
    graph = Graph()
    loader = add_loader(graph, pipeline)
    sampled(graph, loader)
    text = rejection(server, graph, loader)
    for word in words:
        assert re.search(word, text), text
    assert group_processes(server) == before


# --- when the graph runs ---------------------------------------------------------------------------------------------


def test_heads_that_do_not_divide(server):
    before = group_processes(server)
    graph = Graph()
    loader = add_loader(graph, ulysses=3, tp=1)
    sampled(graph, loader)
    text = failure(server, graph, loader)
    # The tiny model has 8 heads; 3 ranks can only be a ring.
    assert "8 attention heads" in text
    assert "tp x ulysses = 3" in text
    assert "would work: ulysses 1, ring 3, tp 1" in text
    assert group_processes(server) == before


@pytest.fixture(scope="module")
def lora(server: ComfyServer) -> str:
    return write_tiny_lora(server)


def test_bypass_lora_is_refused(lora, server):
    graph = Graph()
    loader = add_loader(graph)
    model = graph.add("LoraLoaderBypassModelOnly", model=(loader, 0), lora_name=lora, strength_model=1.0)
    sampled(graph, loader, model=model)
    text = failure(server, graph, model)
    assert "bypass LoRA loader" in text
    assert "Load LoRA (Model)" in text
    assert f"(node {model})" in text


@pytest.mark.parametrize("method", ["offset", "uxo/uno"])
def test_reference_method_is_refused(method, server):
    graph = Graph()
    loader = add_loader(graph)
    image = graph.add("LoadImage", image=EXAMPLE_IMAGE)
    latent = graph.add("VAEEncode", pixels=image, vae=(loader, 2))
    positive = graph.add("ReferenceLatent", conditioning=add_prompt(graph, loader), latent=latent)
    positive = graph.add(
        "FluxKontextMultiReferenceLatentMethod", conditioning=positive, reference_latents_method=method
    )
    text = failure(server, graph, sampled(graph, loader, positive=positive))
    assert method.split("/")[0] in text
    assert "index" in text


def test_latent_of_another_model(server):
    save_file(
        {"latent_tensor": torch.ones(1, 4, 16, 16), "latent_format_version_0": torch.tensor([])},
        server.input / "sd.latent",
    )
    graph = Graph()
    loader = add_loader(graph)
    text = failure(server, graph, sampled(graph, loader, latent_image=graph.add("LoadLatent", latent="sd.latent")))
    assert "the latent has 4 channels, FLUX.2 takes 128" in text
    assert "EmptyFlux2LatentImage" in text


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [
        ("EmptyHunyuanLatentVideo", {"width": 128, "height": 128, "length": 5}, "[1, 128, 2, 8, 8] (a video)"),
        ("EmptyLatentAudio", {"seconds": 10.0}, "(audio)"),
    ],
)
def test_empty_latent_of_another_kind(node, inputs, words, server):
    """Refused at once, the sound before it has been made as long as a video, and the workers stay as they are."""
    before = group_processes(server)
    graph = Graph()
    loader = add_loader(graph)
    latent = graph.add(node, batch_size=1, **inputs)
    text = failure(server, graph, sampled(graph, loader, latent_image=latent))
    assert words in text
    assert "use EmptyFlux2LatentImage" in text
    assert group_processes(server) == before


def test_reference_and_decoded_latent_of_another_model(server):
    before = group_processes(server)
    graph = Graph()
    loader = add_loader(graph)
    other = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    positive = graph.add("ReferenceLatent", conditioning=add_prompt(graph, loader), latent=other)
    text = failure(server, graph, sampled(graph, loader, positive=positive))
    assert "the reference latent has 4 channels, FLUX.2 takes 128" in text
    graph = Graph()
    decoded = graph.add(
        "VAEDecode",
        vae=(add_loader(graph), 2),
        samples=graph.add("EmptyLatentImage", width=128, height=128, batch_size=1),
    )
    graph.add("PreviewImage", images=decoded)
    assert "the latent has 4 channels, FLUX.2 takes 128" in failure(server, graph, decoded)
    assert group_processes(server) == before


def test_empty_latent_of_another_model_is_made_to_fit(server):
    # ComfyUI itself makes an empty latent fit, in channels and size.
    def build(graph: Graph, loader: NodeId) -> NodeId:
        latent = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
        return add_sampler(graph, loader, latent_image=latent)

    ours, reference = latents_of_both(server, build)
    assert tuple(ours.shape) == (1, 128, 8, 8)
    assert relative_error(ours, reference) <= TOLERANCE


def test_an_argument_that_the_model_has_not_is_refused(server):
    graph = Graph()
    loader = add_loader(graph)
    changed = graph.add("ReferenceExtraArgument", model=(loader, 0), name="clip_fea")
    sampler = sampled(graph, loader, model=changed)
    text = failure(server, graph, sampler)
    assert "the model is given clip_fea, which FLUX.2 in the parallel workers does not take" in text
    assert "bypass" in text


def test_torch_compile_is_refused(server):
    graph = Graph()
    loader = add_loader(graph)
    compiled = graph.add("TorchCompileModel", model=(loader, 0), backend="inductor")
    sampled(graph, loader, model=compiled)
    text = failure(server, graph, compiled)
    assert "TorchCompileModel" in text
    assert "bypass" in text


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [
        ("TomePatchModel", {"ratio": 0.3}, "attn1_patch"),
        ("FluxKVCache", {}, "attn1_patch"),  # of FLUX.2 klein 9B KV
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}, "attn1"),
        ("ScaleROPE", {f"{what}_{axis}": 1.0 for what in ("scale", "shift") for axis in "xyt"}, "rope_options"),
    ],
)
def test_block_patches_are_refused_where_they_are_made(node, inputs, words, server):
    graph = Graph()
    loader = add_loader(graph)
    patched = graph.add(node, model=(loader, 0), **inputs)
    sampled(graph, loader, model=patched)
    text = failure(server, graph, patched)
    assert words in text
    assert f"(node {patched})" in text
    assert "bypass" in text


def test_model_cannot_be_saved(server):
    graph = Graph()
    node = graph.add("ModelSave", model=(add_loader(graph), 0), filename_prefix="saved")
    assert "neither merged nor saved" in failure(server, graph, node)
    assert not list(server.output.glob("saved*"))


def test_model_cannot_be_merged(server):
    graph = Graph()
    loader = add_loader(graph)
    node = graph.add("ModelMergeSimple", model1=(loader, 0), model2=(loader, 0), ratio=0.5)
    sampled(graph, loader, model=node)
    assert "neither merged nor saved" in failure(server, graph, node)


def test_clip_layer_cannot_be_chosen(server):
    graph = Graph()
    loader = add_loader(graph)
    clip = graph.add("CLIPSetLastLayer", clip=(loader, 1), stop_at_clip_layer=-2)
    encode = graph.add("CLIPTextEncode", text="a cat", clip=clip)
    sampled(graph, loader, positive=encode)
    assert "CLIP Set Last Layer" in failure(server, graph, clip)


def test_timesteps_of_another_kind_are_refused(server):
    # Stable Diffusion 3's sampling hands the model timesteps up to 1000.
    graph = Graph()
    loader = add_loader(graph)
    model = graph.add("ModelSamplingSD3", model=(loader, 0), shift=3.0)
    sampled(graph, loader, model=model)
    assert "model sampling" in failure(server, graph, model)


def test_timesteps_that_are_no_numbers_are_refused(server):
    graph = Graph()
    loader = add_loader(graph)
    model = graph.add(
        "ModelSamplingFlux", model=(loader, 0), max_shift=float("nan"), base_shift=0.5, width=128, height=128
    )
    assert "timesteps up to nan arrived" in failure(server, graph, sampled(graph, loader, model=model))


def test_report_on_a_stock_model(server):
    graph = Graph()
    model = graph.add("ReferencePipelineLoader", pipeline="tiny")
    node = graph.add("HybridDiT_WorkersReport", model=model)
    assert "does not come from a parallel loader" in failure(server, graph, node)
