"""Load VAE (Parallel) in the place of ComfyUI's own loader: the same file, the same pictures, latents and clips."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.errors import relative_error
from tests.single_file import flux2_tensors, write
from tests.umt5_file import write_umt5
from tests.vae_file import write_tiny_vae, write_vae
from tests.wan_vae import comfy_tensors, tiny_vae, write_wan_vae

from .graphs import Graph, add_layout, run_well
from .processes import worker_ranks
from .test_errors import rejection

PARITY = 1e-4
"""Both sides compute in fp32 from the same numbers. A wrong frame, row or mean gives 1e-2 and more."""
TWO = {"ulysses": 2, "ring": 1, "tp": 1}
"""tests/distributed has those with more ranks."""
TILING = {"tile_size": 64, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}
_names = itertools.count()


@pytest.fixture(scope="module")
def vaes(server):
    """A file of each kind: Wan 2.1's (and Qwen-Image's), Wan 2.2's, FLUX.2's."""
    folder = server.models / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    write_wan_vae(folder / "wan21.safetensors", "2.1")
    write_wan_vae(folder / "wan22.safetensors", "2.2")
    write_vae(folder / "flux2.safetensors")
    return server


def add_vae(graph, name, **layout):
    return graph.add("HybridDiT_LoadVAE", vae_name=name, layout=add_layout(graph, **(layout or TWO)))


def add_stock(graph, name):
    """ComfyUI's own VAE of a file."""
    return graph.add("ReferenceWanVAE" if name == "wan22.safetensors" else "VAELoader", vae_name=name)


def add_clip(graph, *shape):
    return graph.add("ReferenceClip", shape=json.dumps(shape))


def saved(graph, **what):
    return graph.add("ReferenceSaveTensor", name=f"tensor{next(_names)}", **what)


def tensor_of(server, result, node):
    return load_file(server.output / result.outputs[str(node)]["text"][0])["tensor"]


def assert_both_ways(server, name, latent, image, layout=None, tiling=None):
    """Whole and in tiles, decoded and encoded, on our side and on ComfyUI's."""
    tiling = TILING if tiling is None else tiling
    graph, sides = Graph(), []
    for vae in (add_vae(graph, name, **(layout or {})), add_stock(graph, name)):
        samples, pixels = (add_clip(graph, *latent), 0), (add_clip(graph, *image), 1)
        sides.append([
            saved(graph, images=graph.add("VAEDecode", samples=samples, vae=vae)),
            saved(graph, images=graph.add("VAEDecodeTiled", samples=samples, vae=vae, **tiling)),
            saved(graph, samples=graph.add("VAEEncode", pixels=pixels, vae=vae)),
            saved(graph, samples=graph.add("VAEEncodeTiled", pixels=pixels, vae=vae, **tiling)),
        ])  # fmt: skip
    result = run_well(server, graph)
    errors = []
    for ours, theirs in zip(*sides, strict=True):
        expected = tensor_of(server, result, theirs)
        assert expected.std() > 0.05
        errors.append(relative_error(tensor_of(server, result, ours), expected))
    assert max(errors) <= PARITY, errors
    return [tensor_of(server, result, node).shape for node in sides[0]]


@pytest.mark.parametrize(
    ("name", "latent", "image"),
    [
        ("wan21.safetensors", (1, 16, 3, 9, 13), (10, 72, 100, 3)),
        ("wan22.safetensors", (1, 48, 3, 5, 7), (10, 80, 112, 3)),
    ],
)
def test_clips(vaes, name, latent, image):
    """Also of a size and a number of frames that do not divide, whole and in tiles of space and time."""
    frames, _, encoded, _ = assert_both_ways(vaes, name, latent, image)
    side = 8 if latent[1] == 16 else 16
    assert tuple(frames) == (9, latent[3] * side, latent[4] * side, 3)
    assert tuple(encoded) == (1, latent[1], 3, image[1] // side, image[2] // side)


def test_single_pictures(vaes):
    """As of Qwen-Image: a latent of one frame; and FLUX.2's, on the first worker."""
    picture, *_ = assert_both_ways(vaes, "wan21.safetensors", (1, 16, 1, 6, 5), (1, 48, 40, 3))
    assert tuple(picture) == (1, 48, 40, 3)
    assert_both_ways(vaes, "flux2.safetensors", (1, 128, 3, 4), (1, 48, 64, 3), tiling={**TILING, "tile_size": 512})


def test_without_a_layout_and_a_batch_of_clips(vaes):
    graph = Graph()
    samples = (add_clip(graph, 2, 16, 2, 4, 6), 0)
    nodes = [
        saved(graph, images=graph.add("VAEDecode", samples=samples, vae=vae))
        for vae in (
            graph.add("HybridDiT_LoadVAE", vae_name="wan21.safetensors"),
            graph.add("VAELoader", vae_name="wan21.safetensors"),
        )
    ]
    result = run_well(vaes, graph)
    ours, expected = (tensor_of(vaes, result, node) for node in nodes)
    assert expected.shape == (10, 32, 48, 3)
    assert relative_error(ours, expected) <= PARITY


@pytest.mark.parametrize(
    ("node", "name"),
    [("WanImageToVideo", "wan21.safetensors"), ("Wan22ImageToVideoLatent", "wan22.safetensors")],
)
def test_video_nodes(vaes, node, name):
    """What the nodes of Wan's templates encode, with the VAE as one of their inputs."""
    graph, saves = Graph(), []
    start = (add_clip(graph, 1, 64, 96, 3), 1)
    sizes = {"width": 96, "height": 64, "length": 9, "batch_size": 1, "start_image": start}
    for vae in (add_vae(graph, name), add_stock(graph, name)):
        if node == "WanImageToVideo":
            text = graph.add("ReferenceNoText")
            made = graph.add(node, positive=text, negative=text, vae=vae, **sizes)
            saves.append(saved(graph, conditioning=made))
        else:
            saves.append(saved(graph, samples=graph.add(node, vae=vae, **sizes)))
    result = run_well(vaes, graph)
    ours, expected = (tensor_of(vaes, result, save) for save in saves)
    assert expected.std() > 0.05
    assert relative_error(ours, expected) <= PARITY


def test_it_joins_the_workers_of_its_layout(vaes):
    graph = Graph()
    layout = add_layout(graph, **TWO)
    models = vaes.models / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    name = write(models / "with_vae.safetensors", flux2_tensors(heads=4)).name
    model = graph.add("HybridDiT_LoadDiffusionModel", unet_name=name, layout=layout)
    vae = graph.add("HybridDiT_LoadVAE", vae_name="wan21.safetensors", layout=layout)
    graph.add("PreviewAny", source=graph.add("HybridDiT_WorkersReport", model=model))
    saved(graph, images=graph.add("VAEDecode", samples=(add_clip(graph, 1, 16, 1, 5, 5), 0), vae=vae))
    before = set(worker_ranks(vaes))
    run_well(vaes, graph)
    assert len(set(worker_ranks(vaes)) - before) in (0, 2)


def test_progress_and_cancel(vaes):
    """A clip is decoded a few frames at a time: the bar moves, and Cancel does not wait for the rest."""
    steps: list[tuple[int, int]] = []
    latent = (1, 16, 400, 12, 12)
    graph = Graph()
    vae = add_vae(graph, "wan21.safetensors")
    saved(graph, images=graph.add("VAEDecode", samples=(add_clip(graph, *latent), 0), vae=vae))

    def on_message(message):
        if message["type"] == "progress":
            steps.append((message["data"]["value"], message["data"]["max"]))
            if len(steps) == 3:
                vaes.interrupt()

    result = vaes.run(graph, on_message=on_message)
    assert result.interrupted
    values = [value for value, _ in steps]
    assert values == sorted(set(values))
    assert {of for _, of in steps} == {400}
    assert values[-1] < 300
    # The next clip is none of it.
    assert_both_ways(vaes, "wan21.safetensors", (1, 16, 2, 5, 5), (5, 40, 40, 3))


@pytest.fixture(scope="module")
def folder(vaes):
    return vaes.models / "vae"


class TestRefusals:
    def refused(self, server, name, words):
        graph = Graph()
        vae = add_vae(graph, name)
        saved(graph, images=graph.add("VAEDecode", samples=(add_clip(graph, 1, 16, 1, 4, 4), 0), vae=vae))
        assert words in rejection(server, graph, vae)

    def test_another_models_vae(self, vaes, folder):
        name = write_tiny_vae(folder / "taesd.safetensors").name
        self.refused(vaes, name, "ComfyUI's own Load VAE loads it")

    def test_a_text_encoder(self, vaes, folder):
        name = write_umt5(folder / "umt5.safetensors").name
        self.refused(vaes, name, "text encoder")

    def test_a_transformer(self, vaes, folder):
        name = write(folder / "transformer.safetensors", flux2_tensors(heads=4)).name
        self.refused(vaes, name, "Load Diffusion Model (Parallel) loads")

    def test_a_vae_with_transparency(self, vaes, folder):
        tensors = comfy_tensors(tiny_vae("2.1"))
        tensors["encoder.conv1.weight"] = torch.zeros(8, 4, 3, 3, 3)
        tensors["decoder.head.2.weight"] = torch.zeros(4, 8, 3, 3, 3)
        save_file(tensors, folder / "layered.safetensors")
        self.refused(vaes, "layered.safetensors", "Qwen-Image-Layered")

    def test_a_tensor_that_is_missing(self, vaes, folder):
        tensors = comfy_tensors(tiny_vae("2.1"))
        del tensors["decoder.middle.1.proj.weight"]
        save_file(tensors, folder / "cut.safetensors")
        graph = Graph()
        vae = add_vae(graph, "cut.safetensors")
        saved(graph, images=graph.add("VAEDecode", samples=(add_clip(graph, 1, 16, 1, 4, 4), 0), vae=vae))
        assert "decoder.mid_block.attentions.0.proj.weight" in vaes.run(graph).error["exception_message"]

    def test_a_latent_of_another_model(self, vaes):
        graph = Graph()
        vae = add_vae(graph, "wan21.safetensors")
        saved(graph, images=graph.add("VAEDecode", samples=(add_clip(graph, 1, 48, 1, 4, 4), 0), vae=vae))
        assert "48 channels" in vaes.run(graph).error["exception_message"]
