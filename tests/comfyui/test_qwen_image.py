"""Qwen-Image: our MODEL, CLIP and VAE against ComfyUI's own classes with the same weights."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from tests.errors import relative_error

from .conftest import EXAMPLE_IMAGE
from .graphs import Graph, NodeId, add_layout, add_loader, add_reference, run_well, save_latent
from .graphs import saved_latent as latent_of
from .processes import worker_ranks
from .qwen_models import PIPELINE, ZERO
from .test_errors import failure, rejection
from .test_load_clip import save_conditioning, saved_conditioning
from .test_stock_nodes import pixels

TOLERANCE = 1e-4
"""Of the relative error; see test_model.TOLERANCE."""
DIFFERENT = 1e-2
REFERENCES = ((96, 64), (48, 80))
LONG, SHORT = "a red circle on a blue square, highly detailed", "blurry"

Build = Callable[[Graph, NodeId], NodeId]


# --- MODEL -----------------------------------------------------------------------------------------------------------


def encoded(graph: Graph, text: str, *sizes: tuple[int, int], method: str | None = None, pad: int = 0) -> NodeId:
    """A conditioning of ComfyUI's own CLIP, with references of ComfyUI's own VAE cut from the example image."""
    reference = add_reference(graph, PIPELINE)
    clip: object = (reference, 1)
    if pad:
        clip = graph.add("ReferenceTokenizerOption", clip=clip, name="qwen25_7b_min_length", value=pad)
    conditioning = graph.add("CLIPTextEncode", text=text, clip=clip)
    image = graph.add("LoadImage", image=EXAMPLE_IMAGE)
    for width, height in sizes:
        cut = graph.add("ImageCrop", image=image, width=width, height=height, x=40, y=56)
        latent = graph.add("VAEEncode", pixels=cut, vae=(reference, 2))
        conditioning = graph.add("ReferenceLatent", conditioning=conditioning, latent=latent)
    if method is not None:
        conditioning = graph.add("ReferenceMethod", conditioning=conditioning, method=method)
    return conditioning


def sampled(graph: Graph, model: object, positive: NodeId, size=(128, 128), batch: int = 1, **changes) -> NodeId:
    """Two Euler steps with CFG: four evaluations."""
    latent = graph.add("EmptySD3LatentImage", width=size[0], height=size[1], batch_size=batch)
    inputs = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs |= {"negative": encoded(graph, SHORT), "latent_image": latent, **changes}
    return graph.add("KSampler", model=model, positive=positive, **inputs)


def with_references(graph: Graph, loader: NodeId, method: str | None = None) -> NodeId:
    return sampled(graph, (loader, 0), encoded(graph, LONG, *REFERENCES, method=method))


def aura_flow(graph: Graph, loader: NodeId) -> NodeId:
    model = graph.add("ModelSamplingAuraFlow", model=(loader, 0), shift=3.1)
    model = graph.add("CFGNorm", model=model, strength=1.0)
    return sampled(graph, model, encoded(graph, LONG))


CASES: dict[str, Build] = {
    "text": lambda graph, loader: sampled(graph, (loader, 0), encoded(graph, LONG)),
    "odd_size": lambda graph, loader: sampled(graph, (loader, 0), encoded(graph, LONG, (72, 104)), size=(176, 144)),
    "masked": lambda graph, loader: sampled(graph, (loader, 0), encoded(graph, LONG, pad=100)),
    "batch": lambda graph, loader: sampled(graph, (loader, 0), encoded(graph, LONG, REFERENCES[0]), batch=2),
    "aura_flow": aura_flow,
    "own_method": with_references,
    "index_timestep_zero": functools.partial(with_references, method="index_timestep_zero"),
    "negative_index": functools.partial(with_references, method="negative_index"),
    "offset": functools.partial(with_references, method="offset"),
}


@pytest.fixture(scope="module")
def latents(qwen):
    """Case -> (our latent, ComfyUI's)."""

    @functools.cache
    def run(name: str) -> tuple[Tensor, Tensor]:
        graph = Graph()
        loaders = add_loader(graph, PIPELINE), add_reference(graph, PIPELINE)
        saves = [save_latent(graph, CASES[name](graph, loader)) for loader in loaders]
        result = run_well(qwen, graph)
        ours, theirs = (latent_of(qwen, result, save) for save in saves)
        return ours, theirs

    return run


@pytest.mark.parametrize("name", CASES)
def test_same_latent(name, latents):
    ours, theirs = latents(name)
    assert theirs.ndim == 5
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) <= TOLERANCE


def test_cases_differ(latents):
    # What is masked has no influence, so that the masked text is the text.
    assert relative_error(latents("masked")[0], latents("text")[0]) <= TOLERANCE
    same_size = [name for name in CASES if name not in ("odd_size", "batch", "masked")]
    for first, second in itertools.combinations(same_size, 2):
        assert relative_error(latents(first)[0], latents(second)[1]) > DIFFERENT, (first, second)


@pytest.mark.parametrize(("method", "other"), [("uxo", "offset"), ("index", "own_method")])
def test_other_names_of_methods(method, other, qwen, latents):
    graph = Graph()
    save = save_latent(graph, with_references(graph, add_loader(graph, PIPELINE), method))
    ours = latent_of(qwen, run_well(qwen, graph), save)
    assert relative_error(ours, latents(other)[1]) <= TOLERANCE


def float_mask(graph: Graph, scale: float) -> NodeId:
    masked = graph.add("ReferenceFloatMask", conditioning=encoded(graph, LONG, pad=100), scale=scale)
    return sampled(graph, (add_loader(graph, PIPELINE), 0), masked)


def test_a_mask_of_floats(qwen, latents):
    graph = Graph()
    save = save_latent(graph, float_mask(graph, 1e6))
    ours = latent_of(qwen, run_well(qwen, graph), save)
    assert relative_error(ours, latents("masked")[1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen", "qwen_zero"])
def test_a_file(name, qwen, latents):
    """A model that takes references as at timestep 0 says so in its file."""
    graph = Graph()
    model = graph.add(
        "HybridDiT_LoadDiffusionModel",
        unet_name=f"{name}.safetensors",
        layout=add_layout(graph),
        weight_dtype="default",
    )
    save = save_latent(graph, sampled(graph, model, encoded(graph, LONG, *REFERENCES)))
    ours = latent_of(qwen, run_well(qwen, graph), save)
    expected = latents("index_timestep_zero" if name == "qwen_zero" else "own_method")[1]
    assert relative_error(ours, expected) <= TOLERANCE


def test_a_pipeline_with_references_at_timestep_zero(qwen, latents):
    graph = Graph()
    save = save_latent(graph, with_references(graph, add_loader(graph, ZERO)))
    ours = latent_of(qwen, run_well(qwen, graph), save)
    assert relative_error(ours, latents("index_timestep_zero")[1]) <= TOLERANCE


class TestRefusals:
    def test_layers(self, qwen):
        graph = Graph()
        latent = graph.add("EmptyQwenImageLayeredLatentImage", width=128, height=128, layers=3, batch_size=1)
        text = self.sampled_with(qwen, graph, latent_image=latent)
        assert "the latent has 4 frames (or layers)" in text
        assert "EmptySD3LatentImage" in text

    def test_a_mask_that_weighs_tokens(self, qwen):
        graph = Graph()
        sampler = float_mask(graph, 3.0)
        save_latent(graph, sampler)
        assert "weighs tokens (with -3)" in failure(qwen, graph, sampler)

    def test_stable_diffusion_3s_sampling(self, qwen):
        graph = Graph()
        model = graph.add("ModelSamplingSD3", model=(add_loader(graph, PIPELINE), 0), shift=3.0)
        save_latent(graph, sampled(graph, model, encoded(graph, LONG)))
        assert "model sampling" in failure(qwen, graph, model)

    @staticmethod
    def sampled_with(qwen, graph, **changes):
        sampler = sampled(graph, (add_loader(graph, PIPELINE), 0), encoded(graph, LONG), **changes)
        save_latent(graph, sampler)
        return failure(qwen, graph, sampler)


# --- CLIP ------------------------------------------------------------------------------------------------------------


def load_clip(graph: Graph, kind: str) -> object:
    """Our CLIP of a file or a pipeline folder."""
    if kind == "pipeline":
        return (add_loader(graph, PIPELINE), 1)
    return graph.add("HybridDiT_LoadCLIP", clip_name="qwen.safetensors", type="qwen_image", layout=add_layout(graph))


def cut_out(graph: Graph, width: int, height: int, x: int = 0) -> NodeId:
    image = graph.add("LoadImage", image=EXAMPLE_IMAGE)
    return graph.add("ImageCrop", image=image, width=width, height=height, x=x, y=8)


def edit_plus(graph: Graph, clip: object, *images: NodeId, text: str = LONG) -> NodeId:
    named = {f"image{number}": image for number, image in enumerate(images, start=1)}
    return graph.add("TextEncodeQwenImageEditPlus", clip=clip, prompt=text, **named)


def together(graph: Graph, clip: object, *images: NodeId) -> NodeId:
    """Two texts in a batch, filled up to one length, with an image each.

    Of texts with images ComfyUI takes all positions from the first one, so that only equally long ones come out right.
    """
    clip = graph.add("ReferenceTokenizerOption", clip=clip, name="qwen25_7b_min_length", value=100)
    batch = {"images": graph.add("ImageBatch", image1=images[0], image2=images[1])} if images else {}
    second = "a dog" if images else "two red dogs"
    return graph.add("ReferenceEncodeTogether", clip=clip, first="a cat", second=second, weight=1.0, **batch)


ENCODERS: dict[str, Callable[[Graph, object], NodeId]] = {
    "a sentence": lambda graph, clip: graph.add("CLIPTextEncode", text=LONG, clip=clip),
    "nothing": lambda graph, clip: graph.add("CLIPTextEncode", text="", clip=clip),
    "other scripts": lambda graph, clip: graph.add("CLIPTextEncode", text="ein Käse, 猫と犬 🦊", clip=clip),
    "weights are not parsed": lambda graph, clip: graph.add("CLIPTextEncode", text="(a:1.5) [in] ((rain))", clip=clip),
    "padding": lambda graph, clip: graph.add(
        "CLIPTextEncode",
        text=LONG,
        clip=graph.add("ReferenceTokenizerOption", clip=clip, name="qwen25_7b_min_length", value=100),
    ),
    "edit": lambda graph, clip: graph.add(
        "TextEncodeQwenImageEdit", clip=clip, prompt=LONG, image=cut_out(graph, 96, 160)
    ),
    "edit without an image": lambda graph, clip: graph.add("TextEncodeQwenImageEdit", clip=clip, prompt=LONG),
    "edit plus": lambda graph, clip: edit_plus(graph, clip, cut_out(graph, 128, 96)),
    "another image": lambda graph, clip: edit_plus(graph, clip, cut_out(graph, 128, 96, x=64)),
    "two images": lambda graph, clip: edit_plus(graph, clip, cut_out(graph, 64, 160), cut_out(graph, 128, 96)),
    "two images swapped": lambda graph, clip: edit_plus(graph, clip, cut_out(graph, 128, 96), cut_out(graph, 64, 160)),
    "edit plus without an image": edit_plus,
    "two texts": together,
    "two texts with images": lambda graph, clip: together(
        graph, clip, cut_out(graph, 64, 96), cut_out(graph, 64, 96, 64)
    ),
}


# What is read of a folder is in tests/runtime.
@pytest.mark.parametrize("kind", [pytest.param("pipeline", marks=pytest.mark.thorough), "file"])
def test_same_conditioning(kind, qwen):
    """All in one graph, so that what belongs to one prompt could reach another."""
    graph = Graph()
    clips = load_clip(graph, kind), (add_reference(graph, PIPELINE), 1)
    nodes = {
        name: [save_conditioning(graph, encode(graph, clip)) for clip in clips] for name, encode in ENCODERS.items()
    }
    result = run_well(qwen, graph)
    found = {}
    for name, pair in nodes.items():
        ours, theirs = (saved_conditioning(qwen, result, node) for node in pair)
        assert set(ours) == set(theirs), name
        if name == "two texts with images":
            # Behind an image, what is masked stands at positions of its own there; nobody looks at it.
            for one in (ours, theirs):
                one["cond"] = one["cond"][:, theirs["attention_mask"][0].bool()]
        for key, tensor in theirs.items():
            assert relative_error(ours[key], tensor) <= TOLERANCE, (name, key)
        found[name] = theirs
    assert {name for name, one in found.items() if "attention_mask" in one} == {
        "padding", "two texts", "two texts with images"
    }  # fmt: skip
    assert found["a sentence"]["cond"].shape[-1] == 256
    assert relative_error(found["another image"]["cond"], found["edit plus"]["cond"]) > DIFFERENT
    assert found["two images"]["cond"].shape == found["two images swapped"]["cond"].shape
    assert relative_error(found["two images"]["cond"], found["two images swapped"]["cond"]) > DIFFERENT


def test_a_picture_of_files_alone(qwen):
    """Both loaders with one layout share their workers; the image reaches the picture through the text encoder."""
    graph = Graph()
    layout = add_layout(graph)
    model = graph.add(
        "HybridDiT_LoadDiffusionModel", unet_name="qwen.safetensors", layout=layout, weight_dtype="default"
    )
    clip = graph.add("HybridDiT_LoadCLIP", clip_name="qwen.safetensors", type="qwen_image", layout=layout)
    stock = add_reference(graph, PIPELINE)
    saves = []
    for each, encoder in ((model, clip), ((stock, 0), (stock, 1))):
        saves.append(save_latent(graph, sampled(graph, each, edit_plus(graph, encoder, cut_out(graph, 128, 96)))))
    result = run_well(qwen, graph)
    ours, theirs = (latent_of(qwen, result, save) for save in saves)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_another_type_is_refused(qwen):
    graph = Graph()
    clip = graph.add("HybridDiT_LoadCLIP", clip_name="qwen.safetensors", type="flux2", layout=add_layout(graph))
    save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=clip))
    before = worker_ranks(qwen)
    text = failure(qwen, graph, clip)
    assert "text encoder of Qwen-Image" in text
    assert "choose the type 'qwen_image'" in text
    assert worker_ranks(qwen) == before  # nothing was loaded for it
    graph[clip]["inputs"]["type"] = "sdxl"
    assert "'sdxl' not in ['flux2', 'qwen_image', 'wan']" in rejection(qwen, graph, clip)


def test_images_with_an_alpha_channel_are_refused(qwen):
    graph = Graph()
    image = graph.add("LoadImage", image=EXAMPLE_IMAGE)
    mask = graph.add("SolidMask", value=0.5, width=64, height=64)
    node = edit_plus(graph, load_clip(graph, "file"), graph.add("JoinImageWithAlpha", image=image, alpha=mask))
    save_conditioning(graph, node)
    assert "4 channels where 3 are expected" in failure(qwen, graph, node)


def test_generating_text_is_refused(qwen):
    graph = Graph()
    node = graph.add("TextGenerate", clip=load_clip(graph, "file"), prompt="a", max_length=4, sampling_mode="off")
    graph.add("PreviewAny", source=node)
    assert "cannot generate text" in failure(qwen, graph, node)


# --- VAE -------------------------------------------------------------------------------------------------------------


def add_noise(server) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (100, 136, 3), dtype=np.uint8)
    return server.add_input_image("qwen-noise.png", Image.fromarray(noise))


def test_encoding(qwen):
    """Also in tiles, of a size that does not divide by 8, and two pictures at once (for ComfyUI, frames of a video)."""
    graph = Graph()
    image = graph.add("LoadImage", image=add_noise(qwen))
    tiling = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    flipped = graph.add("ImageFlip", image=image, flip_method="y-axis: horizontally")
    batch = graph.add("ImageBatch", image1=image, image2=flipped)
    saves = []
    for loader in (add_loader(graph, PIPELINE), add_reference(graph, PIPELINE)):
        vae = (loader, 2)
        saves.append([
            save_latent(graph, graph.add("VAEEncode", pixels=image, vae=vae)),
            save_latent(graph, graph.add("VAEEncodeTiled", pixels=image, vae=vae, **tiling)),
            save_latent(graph, graph.add("VAEEncode", pixels=batch, vae=vae)),
        ])  # fmt: skip
    result = run_well(qwen, graph)
    for ours, theirs in zip(*saves, strict=True):
        expected = latent_of(qwen, result, theirs)
        assert expected.shape == (1, 16, 1, 12, 17)
        assert expected.std() > 0.5
        assert relative_error(latent_of(qwen, result, ours), expected) <= TOLERANCE


def test_decoding(qwen):
    graph = Graph()
    latent = sampled(graph, (add_reference(graph, PIPELINE), 0), encoded(graph, LONG), size=(160, 128), batch=2)
    tiling = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    saves = []
    for loader in (add_loader(graph, PIPELINE), add_reference(graph, PIPELINE)):
        decoded = [
            graph.add("VAEDecode", samples=latent, vae=(loader, 2)),
            graph.add("VAEDecodeTiled", samples=latent, vae=(loader, 2), **tiling),
        ]
        firsts = [graph.add("ImageFromBatch", image=images, batch_index=1, length=1) for images in decoded]
        saves.append([graph.add("SaveImage", images=images, filename_prefix="qwen") for images in firsts])
    result = run_well(qwen, graph)
    for ours, theirs in zip(*saves, strict=True):
        expected = pixels(qwen, result, theirs)
        assert expected.shape == (128, 160, 3)
        assert expected.std() > 5
        assert 0 < expected.min() < expected.max() < 255
        # Only the rounding to 8 bits may differ.
        assert np.abs(pixels(qwen, result, ours) - expected).max() <= 1
