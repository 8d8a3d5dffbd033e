"""The plot on Block Cache in the real front end: drawn while a run goes, replaced by the next, also in a subgraph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..comfyui.server import CHECKOUT, HOW_TO_GET, ComfyServer, find_comfyui
from .frontend import Frontend, what_is_missing
from .test_drag_and_drop import RUN_SECONDS, drop

WORKFLOW = CHECKOUT / "workflows" / "05_demo_block_cache.json"
STEPS = 12
CACHE_ID = 10

pytestmark = [
    pytest.mark.skipif(find_comfyui() is None, reason=HOW_TO_GET),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]

LISTEN = """() => {
  window.heard = { ended: null, runs: [] };
  app.api.addEventListener("execution_success", () => heard.ended = "success");
  app.api.addEventListener("execution_error", event => heard.ended = event.detail.exception_message);
  app.api.addEventListener("hybrid_dit.block_cache", event => heard.runs.push(
    { ...event.detail, drawn: document.querySelectorAll(".evaluation").length }));
}"""

# The plots of all nodes, also of those in subgraphs: marks by shape, and what can be read.
PLOTS = """() => app.graph.nodes.flatMap(node => node.subgraph?.nodes ?? [node]).flatMap(node => node.widgets ?? [])
  .filter(widget => widget.name === "block_cache_plot").map(({ element: svg }) => ({
    squares: svg.querySelectorAll("rect.evaluation").length,
    circles: svg.querySelectorAll("circle.evaluation").length,
    thresholds: svg.querySelectorAll("line.threshold").length,
    titles: [...svg.querySelectorAll(".evaluation title")].map(title => title.textContent),
    texts: [...svg.querySelectorAll("text")].map(text => text.textContent),
    visible: svg.checkVisibility() && svg.getBoundingClientRect().height > 50,
  }))"""

TEXTS = """id => app.graph.getNodeById(id).widgets.filter(w => typeof w.value === "string").map(w => w.value)"""


@pytest.fixture(scope="module")
def frontend(server: ComfyServer) -> Iterator[Frontend]:
    with Frontend(server) as frontend:
        frontend.page.evaluate(LISTEN)
        yield frontend


def run(frontend: Frontend) -> list[dict[str, Any]]:
    """Press Run; what the page heard of runs with the cache."""
    frontend.page.evaluate("() => { heard.ended = null; heard.runs = []; }")
    frontend.page.get_by_test_id("queue-button").click()
    frontend.page.wait_for_function("() => heard.ended", timeout=RUN_SECONDS * 1000)
    frontend.page.wait_for_timeout(500)
    heard = frontend.call("() => heard")
    assert heard["ended"] == "success"
    assert frontend.errors == []
    return heard["runs"]


def test_plot_after_a_run(frontend: Frontend, tmp_path: Path):
    drop(frontend, WORKFLOW)
    set_widgets(frontend, 7, steps=STEPS)
    before = frontend.graph()
    runs = run(frontend)
    (plot,) = frontend.call(PLOTS)
    last = runs[-1]
    assert not last["running"]
    assert (plot["squares"], plot["circles"], plot["thresholds"]) == (last["computed"], last["cached"], 1)
    assert len(plot["titles"]) == last["computed"] + last["cached"] == STEPS
    assert last["cached"] > 0
    assert "step 1: computed, not measured (nothing cached yet)" in plot["titles"]
    assert f"{last['cached']} cached" in plot["texts"]
    # It was drawn while the run went, too.
    assert any(0 < run["drawn"] < STEPS for run in runs)
    assert plot["visible"]
    texts = frontend.call(TEXTS, CACHE_ID)
    assert any(text.startswith(f"{last['computed']} computed, {last['cached']} cached, about ") for text in texts)
    # What is shown is no part of the workflow.
    assert values_of(frontend.graph()) == values_of(before)
    screenshot = tmp_path / "plot.png"
    frontend.page.screenshot(path=screenshot)
    assert screenshot.stat().st_size > 10_000


def values_of(workflow: dict[str, Any]) -> dict[str, Any]:
    """What is saved of the node's widgets, without the texts that the front end itself keeps there."""
    (node,) = (node for node in workflow["nodes"] if node["id"] == CACHE_ID)
    return {key: value for key, value in node["widgets_values_named"].items() if not key.startswith("$$")}


def test_another_run_replaces_the_plot(frontend: Frontend):
    drop(frontend, WORKFLOW)
    set_widgets(frontend, 6, width=128, height=128)
    set_widgets(frontend, 7, steps=6, seed=2)
    run(frontend)
    (plot,) = frontend.call(PLOTS)
    assert len(plot["titles"]) == 6
    set_widgets(frontend, 7, steps=5)
    runs = run(frontend)
    (plot,) = frontend.call(PLOTS)
    assert len(plot["titles"]) == 5
    assert plot["texts"].count(f"{runs[-1]['computed']} computed") == 1
    # A graph that is opened again, as Undo does it, has its plot again.
    frontend.page.evaluate("async () => app.loadGraphData((await app.graphToPrompt()).workflow)")
    frontend.page.wait_for_timeout(500)
    assert [len(plot["titles"]) for plot in frontend.call(PLOTS)] == [5]


def test_in_a_subgraph(frontend: Frontend):
    drop(frontend, WORKFLOW)
    set_widgets(frontend, 6, width=128, height=128)
    set_widgets(frontend, 7, steps=4, seed=3)
    frontend.page.evaluate("id => app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))", CACHE_ID)
    runs = run(frontend)
    assert ":" in runs[-1]["node"]
    assert [len(plot["titles"]) for plot in frontend.call(PLOTS)] == [4]


def set_widgets(frontend: Frontend, node: int, **values: int) -> None:
    frontend.page.evaluate(
        """([id, values]) => {
          for (const widget of app.graph.getNodeById(id).widgets)
            if (widget.name in values) widget.value = values[widget.name];
        }""",
        [node, values],
    )
