"""The shipped workflows dropped onto ComfyUI's canvas, and one of them run with the Run button."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..comfyui.server import CHECKOUT, HOW_TO_GET, ComfyServer, find_comfyui
from .frontend import Frontend, what_is_missing

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"))
EXAMPLE_IMAGE = CHECKOUT / "workflows" / "hybrid-dit-example.png"
LOADER, REPORT = "HybridDiT_LoadPipeline", "HybridDiT_WorkersReport"
RUN_SECONDS = 120

pytestmark = [
    pytest.mark.skipif(find_comfyui() is None, reason=HOW_TO_GET),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]

# Before the run: keep what the server tells the page.
LISTEN = """() => {
  window.heard = { ended: null, previews: 0, progress: [] };
  const api = app.api;
  api.addEventListener("execution_success", () => heard.ended = "success");
  api.addEventListener("execution_error", event => heard.ended = event.detail.exception_message);
  api.addEventListener("b_preview", event => heard.previews += event.detail.size > 0);
  api.addEventListener("progress_text", event => heard.progress.push([event.detail.nodeId, event.detail.text]));
}"""

# What each node shows below its inputs: progress text and text output are widgets, pictures are not.
SHOWN = """() => app.graph.nodes.map(node => ({
  id: String(node.id), type: node.type, missing: !!node.has_errors,
  texts: (node.widgets ?? []).filter(w => typeof w.value === "string").map(w => w.value),
  images: (node.imgs ?? []).map(image => [image.naturalWidth, image.naturalHeight]),
}))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    server = ComfyServer(environment={"HYBRID_DIT_HOME": str(tmp_path_factory.mktemp("home"))})
    with server:
        shutil.copy(EXAMPLE_IMAGE, server.input)
        yield server


@pytest.fixture(scope="module")
def frontend(server: ComfyServer) -> Iterator[Frontend]:
    with Frontend(server) as frontend:
        yield frontend


def dropped(frontend: Frontend, file: Path) -> dict[str, Any]:
    """Drop a workflow and wait until it is on the canvas; the file's content."""
    workflow = json.loads(file.read_text())
    frontend.errors.clear()
    frontend.drop(file)
    frontend.page.wait_for_function("id => app.graph.id === id", arg=workflow["id"], timeout=20_000)
    # Dialogs about missing nodes or models come a little later.
    frontend.page.wait_for_timeout(700)
    return workflow


def test_each_api_workflow_has_one_to_drop():
    api = {file.stem for file in (CHECKOUT / "workflows" / "api").glob("*.json")}
    assert {file.stem for file in WORKFLOWS} == api


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_drop(file: Path, frontend: Frontend):
    workflow = dropped(frontend, file)
    shown = frontend.call(SHOWN)
    assert {node["id"]: node["type"] for node in shown} == {str(n["id"]): n["type"] for n in workflow["nodes"]}
    assert not [node for node in shown if node["missing"]]
    # What is missing would be said in a dialog.
    assert frontend.page.locator("[role=dialog]:visible").count() == 0
    assert frontend.errors == []
    api = json.loads((file.parent / "api" / file.name).read_text())
    assert {key: (node["class_type"], node["inputs"]) for key, node in frontend.prompt().items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in api.items()
    }


def test_run(server: ComfyServer, frontend: Frontend, tmp_path: Path):
    dropped(frontend, CHECKOUT / "workflows" / "flux2_custom_sampler.json")
    frontend.page.evaluate(LISTEN)
    frontend.page.get_by_test_id("queue-button").click()
    frontend.page.wait_for_function("() => heard.ended", timeout=RUN_SECONDS * 1000)
    heard = frontend.call("() => heard")
    assert heard["ended"] == "success"
    assert heard["previews"] > 0

    # The picture arrives a little after the message that it is there.
    has_picture = "() => app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth"
    frontend.page.wait_for_function(has_picture, timeout=20_000)
    shown = {node["type"]: node for node in frontend.call(SHOWN)}
    assert shown["SaveImage"]["images"] == [[320, 192]]
    assert len(list(server.output.glob("*.png"))) == 1
    loader = shown[LOADER]
    states = [text for node, text in heard["progress"] if node == loader["id"]]
    assert states[0].startswith("starting")
    assert any(text.startswith("loading") for text in states)
    assert states[-1].startswith("ready")
    assert states[-1] in loader["texts"]
    assert any('"ranks"' in text for text in shown[REPORT]["texts"])
    assert frontend.errors == []

    screenshot = tmp_path / "after_the_run.png"
    frontend.page.screenshot(path=screenshot)
    assert screenshot.stat().st_size > 10_000
