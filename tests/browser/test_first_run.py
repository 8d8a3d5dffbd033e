"""The first minutes with one, two and three GPUs: a run that works, problems told once, and a state that is true.

In classic nodes on dark and in Nodes 2.0 on light.
"""

from __future__ import annotations


import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..comfyui.processes import worker_ranks
from ..comfyui.server import CHECKOUT, HOW_TO_GET, ComfyServer, find_comfyui
from .conftest import Gpus
from .frontend import Frontend, what_is_missing
from .test_drag_and_drop import drop

WORKFLOW = CHECKOUT / "workflows" / "flux2_text_to_image.json"
LAYOUT, LOADER, SAMPLER = "HybridDiT_ParallelLayout", "HybridDiT_LoadPipeline", "KSampler"
LAYOUT_ID, LOADER_ID, SAMPLER_ID = "1", "2", "7"
WAIT = 60_000

pytestmark = [
    pytest.mark.skipif(find_comfyui() is None, reason=HOW_TO_GET),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]

LISTEN = """() => {
  window.ended = null;
  app.api.addEventListener("execution_success", () => ended = "success");
  app.api.addEventListener("execution_error", ({ detail: { exception_type, exception_message } }) => {
    ended = `${exception_type}: ${exception_message}`;
  });
  app.api.addEventListener("execution_interrupted", () => ended = "interrupted");
}"""
SET = """([id, values]) => {
  for (const widget of app.graph.getNodeById(id).widgets) if (widget.name in values) widget.value = values[widget.name];
}"""
# What each node says of the workers, and whether all of it can be read.
STATES = """() => Object.fromEntries(app.graph.nodes.flatMap(({ id, widgets = [] }) => widgets
  .filter(widget => widget.name === "hybrid_dit_state" && widget.element.textContent).map(({ element }) => {
    const [line] = element.children, box = element.getBoundingClientRect(), inner = line.getBoundingClientRect();
    return [id, { text: line.textContent, whole: line.checkVisibility() && inner.height > 5 &&
      inner.bottom <= box.bottom + 1 && line.scrollWidth <= line.clientWidth + 1 }];
  })))"""
STATE_HAS = f"([id, words]) => ({STATES})()[id]?.text.includes(words)"


class Page:
    """A tab with a workflow, and what a user does in it."""

    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend
        frontend.page.evaluate(LISTEN)

    def set(self, node: str, **values: Any) -> None:
        self.frontend.page.evaluate(SET, [node, values])

    def press_run(self) -> None:
        self.frontend.page.evaluate("() => ended = null")
        self.frontend.page.get_by_test_id("queue-button").click()

    def run(self) -> str:
        self.press_run()
        self.frontend.page.wait_for_function("() => ended", timeout=2 * WAIT)
        return self.frontend.call("() => ended")

    def wait_for_state(self, node: str, words: str) -> None:
        self.frontend.page.wait_for_function(STATE_HAS, arg=[node, words], timeout=WAIT)

    def states(self) -> dict[str, str]:
        # A node grows a moment after its text did.
        self.frontend.page.wait_for_function(f"() => Object.values(({STATES})()).every(({{ whole }}) => whole)")
        found = self.frontend.call(STATES)
        return {node: state["text"] for node, state in found.items()}

    def screenshot(self, folder: Path) -> None:
        self.frontend.page.screenshot(path=folder / "page.png")


def opened(frontend: Frontend) -> Page:
    page = Page(frontend)
    drop(frontend, WORKFLOW)
    page.set(SAMPLER_ID, steps=2)
    return page


@pytest.fixture(scope="module", params=["classic", "Nodes 2.0"])
def page(request: pytest.FixtureRequest, server: ComfyServer) -> Iterator[Page]:
    modern = request.param == "Nodes 2.0"
    server.post("/settings", {"Comfy.ColorPalette": "light" if modern else "dark"})
    with Frontend(server, vue_nodes=modern) as frontend:
        yield opened(frontend)
    server.post("/settings", {"Comfy.ColorPalette": "dark"})


@pytest.mark.parametrize("count", [3, 1, 2])
def test_the_first_run_takes_all_gpus(count: int, page: Page, gpus: Gpus, server: ComfyServer, tmp_path: Path):
    gpus.set(count)
    server.post("/free", {"free_memory": True})  # as in a ComfyUI that has not run it yet
    page.set(SAMPLER_ID, seed=count)
    assert page.run() == "success"
    page.wait_for_state(LAYOUT_ID, "Not compiled. On two H200, 'compile' took 16 s once")
    states = page.states()
    page.screenshot(tmp_path)
    assert set(states) == {LAYOUT_ID, LOADER_ID}
    assert states[LAYOUT_ID].startswith("Chosen ")
    assert f" of {count} GPU(s): about " in states[LAYOUT_ID]
    assert ("exchanges by copy engines" in states[LAYOUT_ID]) == (count > 1)
    name = states[LAYOUT_ID].split()[1]
    assert states[LOADER_ID] == f"ready: {name} on {count} CPU process{'' if count == 1 else 'es'}"
    assert count in [len(ranks) for ranks in groups(server)]
    assert page.frontend.errors == []


def groups(server: ComfyServer) -> list[set[int]]:
    """The ranks of each group; groups on the CPU stay side by side."""
    found: list[set[int]] = []
    for rank in worker_ranks(server).values():
        free = next((ranks for ranks in found if rank not in ranks), None)
        if free is None:
            found.append({rank})
        else:
            free.add(rank)
    return found
