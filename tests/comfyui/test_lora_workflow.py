"""The shipped workflow with the demo's outline LoRA: what it draws at each strength, and what its loader says."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .graphs import run_well
from .server import CHECKOUT, ComfyServer
from .test_workflows import MAX_DIFFERENCE, MEAN_DIFFERENCE, nodes_of, picture, with_reference

NAME = "14_flux2_lora"
LORA, STRENGTHS, SIDE = "flux2-demo-outline", (0.0, 0.5, 1.0), 256
LESS = 0.6
"""Of the red pixels of a filled circle an outlined one has fewer than this share; measured are 0.48, and 0.97 at half
the strength."""

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    """As it is shipped, on two ranks that hold half of each weight."""
    graph = json.loads((CHECKOUT / "workflows" / "api" / f"{NAME}.json").read_text())
    (layout,) = nodes_of(graph, "HybridDiT_ParallelLayout")
    layout["inputs"] |= {"auto": False, "tp": 2}
    return graph


def red(drawn: np.ndarray) -> np.ndarray:
    return (drawn[..., 0] - drawn[..., 1:].max(-1)) > 60


def check(row: np.ndarray) -> None:
    """A filled circle, one that is hardly another, and one whose middle shows the background."""
    assert row.shape == (SIDE, SIDE * len(STRENGTHS), 3)
    parts = np.split(row, len(STRENGTHS), axis=1)
    areas = [int(red(part).sum()) for part in parts]
    assert areas[0] > 0.1 * SIDE**2
    assert 0.9 * areas[0] < areas[1] < 1.1 * areas[0]
    assert np.abs(parts[1] - parts[0]).max() > 20
    assert areas[2] < LESS * areas[0]
    for part, filled in zip(parts, (True, True, False), strict=True):
        middle = tuple((found.min() + found.max()) // 2 for found in np.nonzero(red(part)))
        assert red(part)[middle] == filled
        assert filled or np.abs(part[middle] - part[2, 2]).max() < 20


def test_what_it_draws_and_what_its_loader_says(workflow, server: ComfyServer):
    assert [node["inputs"]["strength_model"] for node in nodes_of(workflow, "LoraLoaderModelOnly")] == list(STRENGTHS)
    result = run_well(server, workflow, timeout=300)
    check(picture(server, result))
    (loader,) = (key for key, node in workflow.items() if node["class_type"] == "HybridDiT_LoadPipeline")
    states = [text.splitlines()[2:] for node, text in result.texts if node == loader and text.startswith("ready")]
    assert {line for lines in states for line in lines} == {f"LoRA: {LORA} at 0.5", f"LoRA: {LORA} at 1"}

    plain = copy.deepcopy(workflow)
    samplers = nodes_of(plain, "KSampler")
    samplers[0]["inputs"] |= {"steps": 1, "seed": 5}
    (first,) = (key for key, node in plain.items() if node is samplers[0])
    decoded = next(key for key, node in plain.items() if node["inputs"].get("samples") == [first, 0])
    nodes_of(plain, "SaveImage")[0]["inputs"]["images"] = [decoded, 0]
    # Texts are renewed once a second, which a short picture may not last.
    deadline, said = time.monotonic() + 60, ""
    while not said.startswith("ready: TP-2 on 2 CPU processes") or "LoRA" in said:
        assert time.monotonic() < deadline, said
        samplers[0]["inputs"]["seed"] += 1
        said = next((text for node, text in reversed(run_well(server, plain).texts) if node == loader), said)


@pytest.mark.thorough
def test_the_same_as_stock(workflow, server: ComfyServer):
    difference = np.abs(
        picture(server, run_well(server, workflow, timeout=300))
        - picture(server, run_well(server, with_reference(workflow), timeout=300))
    )
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean() < MEAN_DIFFERENCE


def test_the_picture_beside_it_is_its_result():
    with Image.open(CHECKOUT / "workflows" / f"{NAME}.jpg") as shown:
        check(np.asarray(shown.convert("RGB")).astype(int))
