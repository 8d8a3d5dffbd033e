"""The shipped workflows, queued as they are, against the same graphs on the reference loader."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from training.checker import find

from .graphs import run_well
from .server import CHECKOUT, ComfyServer, RunResult

# The others need big files: see test_templates and test_qwen_workflows.
API_WORKFLOWS = sorted((CHECKOUT / "workflows" / "api").glob("*_demo_*.json"))
SCENES = {"02_demo_edit": [("circle", "green")]}
BOTH = [("circle", "red"), ("star", "blue")]
"""Shapes from left to right; all but the edit's draw both. The background is grey."""

MAX_DIFFERENCE, MEAN_DIFFERENCE = 2, 0.05
"""Of 255. Both sides compute in float32 but add in another order, which can move a value over a rounding edge; measured
is 1. Anything wrong in a step is seen in most of the picture."""
UNIFORM = 5.0
"""A picture with a smaller standard deviation than this, of 255, shows nothing."""
OTHER_SEED = 20
"""Largest difference, of 255, that another seed makes at least; the demo model draws the same scene, slightly moved."""

CACHE = "HybridDiT_BlockCache"
CACHED_PSNR = 40.0
"""Of a cached picture against the uncached one, in dB, at least; measured are 49 for the shipped workflow, and 32 for
the uncached picture moved by two pixels."""

STEPPING = ("KSampler", "Flux2Scheduler")
"""What has a number of steps."""
FEW_STEPS = 3
SEEDS = {"KSampler": "seed", "RandomNoise": "noise_seed"}


def with_reference(workflow: dict[str, Any]) -> dict[str, Any]:
    """The graph with the reference loader in the place of this pack's, and without what only this pack has."""
    graph = copy.deepcopy(workflow)
    for node_id, node in list(graph.items()):
        if node["class_type"] == "HybridDiT_LoadPipeline":
            node["class_type"] = "ReferencePipelineLoader"
            node["inputs"] = {"pipeline": node["inputs"]["pipeline"]}
        elif node["class_type"].startswith("HybridDiT_"):
            del graph[node_id]
    return without_caches(workflow, graph)


def without_caches(workflow: dict[str, Any], graph: dict[str, Any] | None = None) -> dict[str, Any]:
    """The graph (default: the workflow) as it is queued where Block Cache is bypassed: what goes in comes out."""
    graph = copy.deepcopy(workflow if graph is None else graph)
    caches = {key: node["inputs"]["model"] for key, node in workflow.items() if node["class_type"] == CACHE}
    for key in caches:
        graph.pop(key, None)
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in caches:
                node["inputs"][name] = caches[value[0]]
    return graph


def with_other_seed(workflow: dict[str, Any]) -> dict[str, Any]:
    graph = copy.deepcopy(workflow)
    for node in nodes_of(graph, *SEEDS):
        node["inputs"][SEEDS[node["class_type"]]] += 1
    return graph


def nodes_of(graph: dict[str, Any], *types: str) -> list[dict[str, Any]]:
    found = [node for node in graph.values() if node["class_type"] in types]
    assert found, f"none of {types} in the graph"
    return found


def picture(server: ComfyServer, result: RunResult) -> np.ndarray:
    (file,) = result.files()
    return np.asarray(server.image(**file).convert("RGB")).astype(int)


def sampler_progress(result: RunResult, graph: dict[str, Any]) -> list[tuple[int, int]]:
    """(value, max) of all progress events of the sampler, in order."""
    samplers = {key for key, node in graph.items() if node["class_type"] in ("KSampler", "SamplerCustomAdvanced")}
    return [
        (node["value"], node["max"])
        for message in result.messages
        if message["type"] == "progress_state"
        for key, node in message["data"]["nodes"].items()
        if key in samplers
    ]


LAYOUTS = {
    "04_demo_custom_sampler": {"ulysses": 2, "ring": 2},
    "02_demo_edit": {"ulysses": 4},
    "03_demo_inpaint": {"ring": 2, "tp": 2},
}
"""As shipped, layouts are automatic: one rank on the CPU. These have more to show; others run on 2 x 2."""


def on_ranks(file: Path, steps: int | None = None) -> dict[str, Any]:
    """A shipped workflow with a layout that splits it: on four ranks as it is, on two with another number of steps."""
    workflow = json.loads(file.read_text())
    for node in nodes_of(workflow, *STEPPING) if steps else ():
        node["inputs"]["steps"] = steps
    (layout,) = nodes_of(workflow, "HybridDiT_ParallelLayout")
    assert layout["inputs"]["auto"] is True
    degrees = {"ulysses": 2} if steps else LAYOUTS.get(file.stem, {"ulysses": 2, "tp": 2})
    layout["inputs"] |= {"auto": False, **degrees}
    return workflow


def test_there_are_workflows():
    assert len(API_WORKFLOWS) >= 5


@pytest.mark.parametrize(
    "steps", [FEW_STEPS, pytest.param(None, marks=pytest.mark.thorough)], ids=["few", "as shipped"]
)
@pytest.mark.parametrize("file", API_WORKFLOWS, ids=lambda file: file.stem)
def test_workflow(file: Path, steps: int | None, server: ComfyServer):
    workflow = without_caches(on_ranks(file, steps))
    result = run_well(server, workflow)
    ours = picture(server, result)
    reference = picture(server, run_well(server, with_reference(workflow)))

    # 256 x 256 where the latent comes from the example image.
    empty = [node for node in workflow.values() if node["class_type"] == "EmptyFlux2LatentImage"]
    width, height = (empty[0]["inputs"]["width"], empty[0]["inputs"]["height"]) if empty else (256, 256)
    assert ours.shape == (height, width, 3)

    difference = np.abs(ours - reference)
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean() < MEAN_DIFFERENCE
    assert ours.std() > UNIFORM
    if steps is None:  # few steps may draw a shape too many
        assert scene(ours) == ("grey", SCENES.get(file.stem, BOTH))

    (steps,) = (node["inputs"]["steps"] for node in nodes_of(workflow, *STEPPING))
    assert len(result.previews) == steps
    assert sampler_progress(result, workflow)[-1] == (steps, steps)

    for key, node in workflow.items():
        if node["class_type"] == "HybridDiT_WorkersReport":
            check_report(json.loads(result.outputs[key]["text"][0]), workflow, steps)

    if steps is None or file == API_WORKFLOWS[0]:  # proof that the comparison can fail
        other = picture(server, run_well(server, with_other_seed(workflow)))
        assert np.abs(other - ours).max() > OTHER_SEED


WITH_CACHE = pytest.mark.parametrize(
    "file", [file for file in API_WORKFLOWS if CACHE in file.read_text()], ids=lambda file: file.stem
)


# In a browser it runs in `make test`, and tests/runtime has the quality of both presets.
@pytest.mark.thorough
@WITH_CACHE
def test_cached_workflow(file: Path, server: ComfyServer):
    workflow = on_ranks(file)
    result = run_well(server, workflow)
    cached = picture(server, result)
    uncached = picture(server, run_well(server, without_caches(workflow)))
    (steps,) = (node["inputs"]["steps"] for node in nodes_of(workflow, *STEPPING))

    run = [message["data"] for message in result.messages if message["type"] == "hybrid_dit.block_cache"][-1]
    assert run["computed"] + run["cached"] == steps
    assert run["cached"] >= steps // 4
    assert not np.array_equal(cached, uncached)
    assert psnr(cached, uncached) > CACHED_PSNR
    assert scene(cached) == ("grey", BOTH)
    # Proof that the comparison can fail: the same picture, moved by two pixels.
    assert psnr(np.roll(uncached, 2, axis=1), uncached) < CACHED_PSNR - 5


@pytest.mark.thorough
@WITH_CACHE
def test_a_cache_leaves_nothing_behind(file: Path, server: ComfyServer):
    """The picture without it is the one that was there before it."""
    workflow = on_ranks(file)
    uncached = picture(server, run_well(server, without_caches(workflow)))
    run_well(server, workflow)
    again = without_caches(workflow)
    for node in nodes_of(again, "SaveImage"):
        node["inputs"]["filename_prefix"] += "-again"
    for node in nodes_of(again, "KSampler"):
        node["inputs"]["denoise"] = 0.99999  # or the latent would come from ComfyUI's cache; the steps are the same
    assert np.array_equal(picture(server, run_well(server, again)), uncached)


def scene(picture: np.ndarray) -> tuple[str, list[tuple[str | None, str]]]:
    """The background, and the shapes from left to right, as the checker of the demo model sees them."""
    background, found = find(picture.astype(np.uint8))
    return background, [(thing.shape, thing.colour) for thing in sorted(found, key=lambda thing: thing.x)]


@pytest.mark.parametrize("file", API_WORKFLOWS, ids=lambda file: file.stem)
def test_the_picture_beside_it_is_its_result(file: Path):
    with Image.open(CHECKOUT / "workflows" / f"{file.stem}.jpg") as shown:
        assert scene(np.asarray(shown.convert("RGB"))) == ("grey", SCENES.get(file.stem, BOTH))


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return peak_signal_noise_ratio(reference, picture, data_range=255)


def check_report(report: dict[str, Any], workflow: dict[str, Any], steps: int) -> None:
    (layout,) = (node["inputs"] for node in nodes_of(workflow, "HybridDiT_ParallelLayout"))
    degrees = {axis: layout[axis] for axis in ("ulysses", "ring", "tp")}
    ranks = math.prod(degrees.values())
    assert {axis: report["layout"][axis] for axis in degrees} == degrees
    assert report["layout"]["ranks"] == len(report["ranks"]) == ranks
    assert report["model"]["family"] == "flux2"
    assert len(report["seconds"]["steps"]) >= steps  # the model may have drawn before


def test_a_workflow_has_a_report():
    # Or check_report would never be called.
    assert any("HybridDiT_WorkersReport" in file.read_text() for file in API_WORKFLOWS)
