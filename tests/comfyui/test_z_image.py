"""Z-Image: our MODEL against ComfyUI's own class with the same file, between ComfyUI's own CLIP and samplers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.errors import relative_error
from tests.qwen3_file import CONFIG, write_qwen3
from tests.single_file import to_fp8, write
from tests.z_image_file import z_image_model, z_image_tensors

from .cache_graphs import add_cache, counts, runs
from .graphs import Graph, NodeId, add_layout, run_well, save_latent, saved_latent
from .server import ComfyServer
from .test_errors import failure

TOLERANCE = 1e-4
"""Of the relative error of latents; see test_model.TOLERANCE."""
DIFFERENT = 1e-2
FILE, FP8, DEQUANTIZED, TEXT = ("z.safetensors", "z_fp8.safetensors", "z_dense.safetensors", "qwen3.safetensors")
LAYOUTS = {"Ulysses-2": {"ulysses": 2, "tp": 1}, "TP-2": {"ulysses": 1, "tp": 2}}
LONG = "a red circle on a blue square, highly detailed, " * 4
"""Over 32 tokens, to a multiple of which the model pads."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def z_image(server: ComfyServer) -> ComfyServer:
    folder = server.models / "diffusion_models"
    for path in (folder, server.models / "text_encoders"):
        path.mkdir(parents=True, exist_ok=True)
    tensors = z_image_tensors(z_image_model())
    write(folder / FILE, tensors)
    stored, metadata = to_fp8(tensors, "metadata", part="layers.")
    write(folder / FP8, stored, metadata=metadata)
    scales = {name.removesuffix("_scale"): scale for name, scale in stored.items() if name.endswith("_scale")}
    write(folder / DEQUANTIZED, {name: stored[name].float() * scales.get(name, 1.0) for name in tensors})
    write_qwen3(server.models / "text_encoders" / TEXT)
    return server


def add_model(graph: Graph, layout: str = "Ulysses-2", name: str = FILE) -> NodeId:
    return graph.add("HybridDiT_LoadDiffusionModel", unet_name=name, layout=add_layout(graph, **LAYOUTS[layout]))


def add_stock(graph: Graph, name: str = FILE) -> NodeId:
    return graph.add("ReferenceZImage", unet_name=name)


def add_text(graph: Graph, text: str) -> NodeId:
    clip = graph.add("ReferenceTextEncoder", clip_name=TEXT, config=json.dumps(CONFIG), type="lumina2")
    return graph.add("CLIPTextEncode", text=text, clip=clip)


def add_sampler(graph: Graph, model: Any, size: tuple[int, int] = (128, 96), batch: int = 1, **changes: Any) -> NodeId:
    """Two Euler steps with CFG, whose prompts are of different lengths."""
    latent = graph.add("EmptySD3LatentImage", width=size[0], height=size[1], batch_size=batch)
    inputs = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs |= {"positive": add_text(graph, LONG), "negative": add_text(graph, "blurry"), "latent_image": latent}
    return graph.add("KSampler", model=model, **{**inputs, **changes})


def turbo(graph: Graph, model: Any) -> NodeId:
    """As the template has it."""
    text = add_text(graph, "a red circle")
    model = graph.add("ModelSamplingAuraFlow", model=model, shift=3.0)
    zero = graph.add("ConditioningZeroOut", conditioning=text)
    options = {"cfg": 1.0, "sampler_name": "res_multistep", "steps": 4}
    return add_sampler(graph, model, positive=text, negative=zero, **options)


CASES: dict[str, Callable[[Graph, Any], NodeId]] = {
    "two prompts": lambda graph, model: add_sampler(graph, model),
    "odd sizes, a batch of two": lambda graph, model: add_sampler(graph, model, (136, 104), 2),
    "turbo": turbo,
}


Latents = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def latents(z_image: ComfyServer) -> Latents:
    """Who computes it (ComfyUI, or a layout of ours) -> case -> the latent."""

    @functools.cache
    def run(who: str) -> dict[str, Tensor]:
        graph = Graph()
        model = add_model(graph, who) if who in LAYOUTS else add_stock(graph)
        saves = {case: save_latent(graph, build(graph, model)) for case, build in CASES.items()}
        result = run_well(z_image, graph)
        return {case: saved_latent(z_image, result, save) for case, save in saves.items()}

    return run


# tests/distributed has each on every layout.
@pytest.mark.parametrize("layout", ["Ulysses-2", pytest.param("TP-2", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("case", CASES)
def test_same_latent(case: str, layout: str, latents: Latents):
    ours, theirs = latents(layout)[case], latents("ComfyUI")[case]
    assert tuple(theirs.shape) == ((2, 16, 13, 17) if "odd" in case else (1, 16, 12, 16))
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) <= TOLERANCE


def test_cases_differ(latents: Latents):
    """Proof that the comparison can fail: prompts, pictures of a batch and samplers reach the latent."""
    ours = latents("TP-2")
    assert relative_error(ours["two prompts"], latents("ComfyUI")["turbo"]) > DIFFERENT
    assert relative_error(*ours["odd sizes, a batch of two"].split(1)) > DIFFERENT


def test_fp8(z_image: ComfyServer, latents: Latents):
    graph = Graph()
    models = add_model(graph, "TP-2", FP8), add_stock(graph, DEQUANTIZED)
    saves = [save_latent(graph, add_sampler(graph, model)) for model in models]
    saves.append(save_latent(graph, add_sampler(graph, models[0], negative=add_text(graph, "sharp"))))
    result = run_well(z_image, graph)
    ours, theirs, other = (saved_latent(z_image, result, save) for save in saves)
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(other, ours) > 1e-3
    assert relative_error(ours, latents("ComfyUI")["two prompts"]) > 1e-3  # the file is not the one in fp32


def test_block_cache(z_image: ComfyServer):
    graph = Graph()
    model = add_model(graph)
    caches = [add_cache(graph, model, residual_diff_threshold=threshold) for threshold in (1.0, 0.0)]
    saves = [save_latent(graph, add_sampler(graph, each, steps=6)) for each in (*caches, model)]
    result = run_well(z_image, graph)
    cached, never, uncached = (saved_latent(z_image, result, save) for save in saves)
    assert [counts(run) for cache in caches for run in runs(result, cache)] == [(4, 8, 2), (12, 0, 2)]
    assert torch.equal(never, uncached)
    assert 1e-4 < relative_error(cached, uncached) < 1


def test_what_is_refused(z_image: ComfyServer):
    graph = Graph()
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    reference = graph.add("ReferenceLatent", conditioning=add_text(graph, "a cat"), latent=latent)
    sampler = add_sampler(graph, add_model(graph), positive=reference)
    save_latent(graph, sampler)
    text = failure(z_image, graph, sampler)
    assert "has ref_latents, for Z-Image-Omni, which is not supported; bypass the node that adds" in text

    graph = Graph()
    patched = graph.add("TomePatchModel", model=add_model(graph), ratio=0.3)
    save_latent(graph, add_sampler(graph, patched))
    text = failure(z_image, graph, patched)
    assert "attn1_patch" in text
    assert "bypass" in text


@pytest.mark.parametrize("key", ["layers.0.attention.qkv", "layers.1.attention.to_k"])
def test_a_lora(z_image: ComfyServer, key: str):
    """Under ComfyUI's names, of queries, keys and values in one, and under diffusers', of the keys alone."""
    folder = z_image.models / "loras"
    folder.mkdir(exist_ok=True)
    rows, generator = 3 * 288 if "qkv" in key else 288, torch.Generator().manual_seed(0)
    tensors = {"lora_A.weight": torch.randn(4, 288, generator=generator) / 17}
    tensors["lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    name = f"{key}.safetensors"
    write(folder / name, tensors, f"diffusion_model.{key}.")
    graph, saves = Graph(), []
    for model in (add_model(graph, "TP-2"), add_stock(graph)):
        lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
        saves += [save_latent(graph, add_sampler(graph, each)) for each in (lora, model)]
    result = run_well(z_image, graph)
    ours, without, theirs, _ = (saved_latent(z_image, result, save) for save in saves)
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(ours, without) > 1e-3
