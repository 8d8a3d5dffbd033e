"""Stock nodes that reach deeper into MODEL and VAE than the shipped workflows: tiled VAE, caches, several loaders."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.errors import relative_error

from .graphs import (
    Graph,
    NodeId,
    add_latent,
    add_loader,
    add_reference,
    add_sampler,
    latents_of_both,
    run_well,
    save_latent,
    saved_latent,
)
from .server import ComfyServer, RunResult

TOLERANCE = 1e-4  # see test_model.TOLERANCE


def pixels(server: ComfyServer, result: RunResult, node: NodeId) -> np.ndarray:
    """The picture that a SaveImage node wrote, ``[H, W, 3]``."""
    (file,) = result.outputs[str(node)]["images"]
    image = server.image(file["filename"], file["subfolder"], file["type"])
    return np.asarray(image.convert("RGB")).astype(int)


def test_tiled_decoding(server):
    graph = Graph()
    ours, reference = add_loader(graph), add_reference(graph)
    latent = add_sampler(graph, ours, latent_image=add_latent(graph, 160, 128))

    def saved(images: NodeId) -> NodeId:
        return graph.add("SaveImage", images=images, filename_prefix="tiled")

    whole = saved(graph.add("VAEDecode", samples=latent, vae=(reference, 2)))
    tiling = {"samples": latent, "vae": (ours, 2), "temporal_size": 64, "temporal_overlap": 8}
    one_tile = saved(graph.add("VAEDecodeTiled", tile_size=512, overlap=64, **tiling))
    tiles = saved(graph.add("VAEDecodeTiled", tile_size=64, overlap=32, **tiling))
    result = run_well(server, graph)
    expected = pixels(server, result, whole)
    assert expected.shape == (128, 160, 3)
    # One tile is the whole picture: only the rounding to 8 bits may differ.
    assert np.abs(pixels(server, result, one_tile) - expected).max() <= 1
    # Small tiles see less of the picture, and so differ; but it is the same picture.
    difference = pixels(server, result, tiles) - expected
    assert 0 < np.abs(difference).mean() < expected.std()


def test_tiled_encoding(server):
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    server.add_input_image("tiled.png", Image.fromarray(noise))
    graph = Graph()
    ours, reference = add_loader(graph), add_reference(graph)
    image = graph.add("LoadImage", image="tiled.png")
    tiling = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    encoded = [
        graph.add("VAEEncode", pixels=image, vae=(reference, 2)),
        graph.add("VAEEncode", pixels=image, vae=(ours, 2)),
        graph.add("VAEEncodeTiled", pixels=image, vae=(ours, 2), **tiling),
    ]
    saves = [save_latent(graph, latent) for latent in encoded]
    result = run_well(server, graph)
    expected, whole, tiled = (saved_latent(server, result, save) for save in saves)
    assert expected.shape == (1, 128, 6, 8)
    assert relative_error(whole, expected) <= TOLERANCE
    assert relative_error(tiled, expected) <= TOLERANCE


@pytest.mark.parametrize("cache", ["EasyCache", "LazyCache"])
def test_comfyuis_own_caches_skip_the_same_steps(server, cache):
    def build(graph: Graph, loader: NodeId, threshold: float = 3.0) -> NodeId:
        thresholds = {"reuse_threshold": threshold, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        cached = graph.add(cache, model=(loader, 0), **thresholds)
        return add_sampler(graph, loader, model=cached, steps=6)

    ours, reference = latents_of_both(server, build)
    assert relative_error(ours, reference) <= TOLERANCE
    uncached, _ = latents_of_both(server, lambda graph, loader: add_sampler(graph, loader, steps=6))
    assert relative_error(ours, uncached) > 1e-2, "no step was skipped"


def test_two_layouts_in_one_graph(server):
    graph = Graph()
    loaders = [add_loader(graph), add_loader(graph, ulysses=1, ring=2, tp=1), add_reference(graph)]
    # The second sampler of each goes on where the first one of the next layout stopped.
    halves = [add_sampler(graph, loader, seed=3) for loader in loaders]
    crossed = [
        add_sampler(graph, loader, seed=4, denoise=0.5, latent_image=half)
        for loader, half in zip(loaders, (halves[1], halves[2], halves[0]), strict=True)
    ]
    saves = [save_latent(graph, latent) for latent in (*halves, *crossed)]
    result = run_well(server, graph)
    latents = [saved_latent(server, result, save) for save in saves]
    for first in (0, 3):
        for ours in latents[first : first + 2]:
            assert relative_error(ours, latents[first + 2]) <= TOLERANCE
