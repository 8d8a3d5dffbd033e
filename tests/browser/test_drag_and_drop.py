"""The shipped workflows dropped onto ComfyUI's canvas, and one of them run with the Run button."""

from __future__ import annotations

import json
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
LOADER, REPORT, LAYOUT = "HybridDiT_LoadPipeline", "HybridDiT_WorkersReport", "HybridDiT_ParallelLayout"
RUN_SECONDS = 120

pytestmark = [
    pytest.mark.skipif(find_comfyui() is None, reason=HOW_TO_GET),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]

# Before the run: keep what the server tells the page.
LISTEN = """() => {
  window.heard = { ended: null, previews: 0, states: [], stock: [], texts: {} };
  const api = app.api;
  api.addEventListener("execution_success", () => heard.ended = "success");
  api.addEventListener("execution_error", event => heard.ended = event.detail.exception_message);
  api.addEventListener("b_preview", event => heard.previews += event.detail.size > 0);
  api.addEventListener("hybrid_dit.state", event => heard.states.push([event.detail.node, event.detail.text]));
  api.addEventListener("progress_text", event => heard.stock.push(event.detail.nodeId));
  api.addEventListener("executed", event => heard.texts[event.detail.node] = event.detail.output?.text);
}"""

# What each node shows below its inputs: states and texts are widgets, pictures are not.
SHOWN = """() => app.graph.nodes.map(node => ({
  id: String(node.id), type: node.type, missing: !!node.has_errors,
  texts: (node.widgets ?? []).map(w => w.name === "hybrid_dit_state" ? w.element.textContent : w.value)
    .filter(text => typeof text === "string"),
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


BEFORE = [4, 2, 1, "0,1", 2, "10.0.0.1:29500", False, True, False, True]
"""What Parallel Layout saved before its switch stood first."""
NAMES = (
    *("ulysses", "ring", "tp", "devices", "nnodes", "rdzv_endpoint", "auto"),
    *("compile", "cuda_graphs", "copy_engines"),
)


@pytest.mark.parametrize(
    ("count", "automatic", "named"),
    [
        (4, False, False),
        (10, False, True),
        *(
            pytest.param(*values, marks=pytest.mark.thorough)
            for values in ((4, False, True), (6, False, False), (6, False, True), (7, True, True), (10, False, False))
        ),
        (7, True, False),
    ],
)
def test_a_layout_saved_before_keeps_its_values(count, automatic, named, frontend: Frontend, tmp_path: Path):
    """Each version of the node saved so many values; those that it had not had no effect."""
    values = [*BEFORE[:6], automatic, *BEFORE[7:]][:count]
    workflow = json.loads(WORKFLOWS[0].read_text())
    workflow["id"] = f"22222222-2222-4222-8222-2222222222{count:02}"
    (node,) = (node for node in workflow["nodes"] if node["type"] == LAYOUT)
    node["widgets_values"] = values
    del node["widgets_values_named"]
    if named:
        node["widgets_values_named"] = dict(zip(NAMES, values, strict=False))
    file = tmp_path / f"before_{count}.json"
    file.write_text(json.dumps(workflow))
    drop(frontend, file)
    (inputs,) = (node["inputs"] for node in frontend.prompt().values() if node["class_type"] == LAYOUT)
    absent = {"nnodes": 1, "rdzv_endpoint": "", "compile": False, "cuda_graphs": False, "copy_engines": False}
    assert inputs == {**absent, "auto": False, **dict(zip(NAMES, values, strict=False))}
    # Saved again, it is as it is today, and opened again the same.
    file.write_text(json.dumps(frontend.graph() | {"id": workflow["id"][:-2] + f"{count + 50}"}))
    drop(frontend, file)
    assert inputs in [node["inputs"] for node in frontend.prompt().values()]


def test_run_makes_a_picture(ran: Run, server: ComfyServer):
    assert ran.shown["SaveImage"]["images"] == [[320, 192]]
    assert list(server.output.glob("*.png"))
    assert ran.heard["previews"] > 0
    assert ran.errors == []
    assert ran.screenshot.stat().st_size > 10_000


def test_loader_shows_its_state(ran: Run):
    loader = ran.shown[LOADER]
    states = [text for node, text in ran.heard["states"] if node == loader["id"]]
    ready, took = states[-1].split("\n")
    assert ready.startswith("ready: ")
    assert ready.endswith(" on 2 CPU processes")
    assert took.startswith("started in ")
    assert states[-1] in loader["texts"]


def test_report_has_each_rank(ran: Run):
    (text,) = ran.heard["texts"][ran.shown[REPORT]["id"]]
    assert len(json.loads(text)["ranks"]) == 2


def test_report_is_shown_on_its_node(ran: Run):
    shown = "\n".join(ran.shown[REPORT]["texts"])
    assert all(words in shown for words in (" s a step (median of ", " rank(s): ", "rank 0, cpu: ", " GiB at most, "))


def test_stock_nodes_show_no_state(ran: Run):
    ours = {ran.shown[name]["id"] for name in (LOADER, LAYOUT, REPORT)}
    assert {node for node, _ in ran.heard["states"]} | set(ran.heard["stock"]) <= ours


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
