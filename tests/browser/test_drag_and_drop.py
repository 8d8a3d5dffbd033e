"""The shipped workflows dropped onto ComfyUI's canvas, and one of them run with the Run button."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..comfyui.server import CHECKOUT, HOW_TO_GET, ComfyServer, find_comfyui
from .frontend import Frontend, what_is_missing

# The others ask for files that are not there.
WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*_demo_*.json"))
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
  window.heard = { ended: null, previews: 0, states: [], texts: {} };
  const api = app.api;
  api.addEventListener("execution_success", () => heard.ended = "success");
  api.addEventListener("execution_error", event => heard.ended = event.detail.exception_message);
  api.addEventListener("b_preview", event => heard.previews += event.detail.size > 0);
  api.addEventListener("progress_text", event => heard.states.push([event.detail.nodeId, event.detail.text]));
  api.addEventListener("executed", event => heard.texts[event.detail.node] = event.detail.output?.text);
}"""

# What each node shows below its inputs: states and texts are widgets, pictures are not.
SHOWN = """() => app.graph.nodes.map(node => ({
  id: String(node.id), type: node.type, missing: !!node.has_errors,
  texts: (node.widgets ?? []).filter(w => typeof w.value === "string").map(w => w.value),
  images: (node.imgs ?? []).map(image => [image.naturalWidth, image.naturalHeight]),
}))"""

HAS_PICTURE = "() => app.graph.nodes.find(node => node.type === 'SaveImage').imgs?.[0]?.naturalWidth"


@dataclass
class Run:
    """One run by the Run button: what the page heard, what the nodes show after it by type, and console errors."""

    heard: dict[str, Any]
    shown: dict[str, dict[str, Any]]
    errors: list[str]
    screenshot: Path


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


@pytest.fixture(scope="module")
def ran(frontend: Frontend, tmp_path_factory: pytest.TempPathFactory) -> Run:
    drop(frontend, CHECKOUT / "workflows" / "04_demo_custom_sampler.json")
    frontend.page.evaluate(LISTEN)
    frontend.page.get_by_test_id("queue-button").click()
    frontend.page.wait_for_function("() => heard.ended", timeout=RUN_SECONDS * 1000)
    heard = frontend.call("() => heard")
    assert heard["ended"] == "success"
    # The picture arrives a little after the message that it is there.
    frontend.page.wait_for_function(HAS_PICTURE, timeout=20_000)
    screenshot = tmp_path_factory.mktemp("screenshots") / "after_the_run.png"
    frontend.page.screenshot(path=screenshot)
    shown = {node["type"]: node for node in frontend.call(SHOWN)}
    return Run(heard, shown, list(frontend.errors), screenshot)


def drop(frontend: Frontend, file: Path) -> dict[str, Any]:
    """Drop a workflow and wait until it is on the canvas; the file's content."""
    workflow = json.loads(file.read_text())
    frontend.errors.clear()
    frontend.drop(file)
    frontend.page.wait_for_function("id => app.graph.id === id", arg=workflow["id"], timeout=20_000)
    # What is missing is said a little later.
    frontend.page.wait_for_timeout(700)
    return workflow


def complaints(frontend: Frontend) -> list[str]:
    """The texts of dialogs and error messages that the user has before them."""
    return frontend.page.locator("[role=dialog]:visible, [data-testid=error-overlay]:visible").all_inner_texts()


def test_each_api_workflow_has_one_to_drop():
    api = {file.stem for file in (CHECKOUT / "workflows" / "api").glob("*.json")}
    assert {file.stem for file in (CHECKOUT / "workflows").glob("*.json")} == api
    assert WORKFLOWS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_drop(file: Path, frontend: Frontend):
    workflow = drop(frontend, file)
    shown = frontend.call(SHOWN)
    assert {node["id"]: node["type"] for node in shown} == {str(n["id"]): n["type"] for n in workflow["nodes"]}
    assert not [node for node in shown if node["missing"]]
    assert complaints(frontend) == []
    assert frontend.errors == []
    api = json.loads((file.parent / "api" / file.name).read_text())
    assert {key: (node["class_type"], node["inputs"]) for key, node in frontend.prompt().items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in api.items()
    }


def test_run_makes_a_picture(ran: Run, server: ComfyServer):
    assert ran.shown["SaveImage"]["images"] == [[320, 192]]
    assert len(list(server.output.glob("*.png"))) == 1
    assert ran.heard["previews"] > 0
    assert ran.errors == []
    assert ran.screenshot.stat().st_size > 10_000


def test_loader_shows_its_state(ran: Run):
    loader = ran.shown[LOADER]
    states = [text for node, text in ran.heard["states"] if node == loader["id"]]
    assert states[0].startswith("starting")
    assert any(text.startswith("loading") for text in states)
    assert states[-1].startswith("ready")
    assert states[-1] in loader["texts"]


def test_report_has_each_rank(ran: Run):
    (text,) = ran.heard["texts"][ran.shown[REPORT]["id"]]
    assert len(json.loads(text)["ranks"]) == 4


def test_report_is_shown_on_its_node(ran: Run):
    shown = "\n".join(ran.shown[REPORT]["texts"])
    assert all(words in shown for words in (" s a step (median of ", " rank(s): ", "rank 0, cpu: ", " GiB at most, "))


def test_stock_nodes_show_no_state(ran: Run):
    assert {node for node, _ in ran.heard["states"]} <= {ran.shown[LOADER]["id"], ran.shown[REPORT]["id"]}


def test_what_is_missing_is_seen(frontend: Frontend, tmp_path: Path):
    """Proof that test_drop can fail."""
    workflow = json.loads(WORKFLOWS[0].read_text())
    workflow["id"] = "11111111-1111-4111-8111-111111111111"
    next(node for node in workflow["nodes"] if node["type"] == LOADER)["type"] = "HybridDiT_NotThere"
    file = tmp_path / "missing.json"
    file.write_text(json.dumps(workflow))
    drop(frontend, file)
    assert [node["type"] for node in frontend.call(SHOWN) if node["missing"]] == ["HybridDiT_NotThere"]
    assert any("HybridDiT_NotThere" in text for text in complaints(frontend))
