"""The first minutes with one, two and three GPUs: a run that works, problems told once, and a state that is true.

In classic nodes on dark and in Nodes 2.0 on light.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..comfyui.processes import fork_servers, worker_ranks
from ..comfyui.server import CHECKOUT, HOW_TO_GET, ComfyServer, find_comfyui
from .conftest import Gpus
from .frontend import Frontend, what_is_missing
from .test_drag_and_drop import drop

WORKFLOW = CHECKOUT / "workflows" / "01_demo_text_to_image.json"
LAYOUT_ID, LOADER_ID, LATENT_ID, SAMPLER_ID = "1", "2", "6", "7"
RED = "document.querySelectorAll('.text-node-stroke-error').length"
"""Labels of inputs that Nodes 2.0 marks as wrong."""
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
CONNECT = "([from, to]) => app.graph.getNodeById(from).connect(0, app.graph.getNodeById(to), 'latent_image')"
VIDEO_LATENT = """sampler => {
  const node = LiteGraph.createNode("EmptyHunyuanLatentVideo"), values = { width: 64, height: 64, length: 5 };
  app.graph.add(node);
  for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name];
  node.connect(0, app.graph.getNodeById(sampler), "latent_image");
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
        self.classic = not frontend.settings["Comfy.VueNodes.Enabled"]
        frontend.page.evaluate(LISTEN)
        drop(frontend, WORKFLOW)
        self.set(SAMPLER_ID, steps=2)
        self.set(LATENT_ID, width=128, height=128)

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

    @contextmanager
    def another(self) -> Iterator[Page]:
        """A second tab with the same workflow."""
        with self.frontend.another_tab() as frontend:
            yield Page(frontend)

    def screenshot(self, folder: Path) -> None:
        self.frontend.page.screenshot(path=folder / "page.png")


MODERN = "Nodes 2.0"
# What does not depend on how nodes are drawn.
ANY_LOOK = pytest.mark.parametrize("page", ["classic", pytest.param(MODERN, marks=pytest.mark.thorough)], indirect=True)


@pytest.fixture(scope="module", params=["classic", MODERN])
def page(request: pytest.FixtureRequest, server: ComfyServer) -> Iterator[Page]:
    modern = request.param == MODERN
    server.post("/settings", {"Comfy.ColorPalette": "light" if modern else "dark"})
    with Frontend(server, vue_nodes=modern) as frontend:
        yield Page(frontend)
    server.post("/settings", {"Comfy.ColorPalette": "dark"})


def run_fresh(page: Page, server: ComfyServer, count: int) -> dict[str, str]:
    """Run as a ComfyUI with so many GPUs does that has not run it yet; what the nodes say of the workers."""
    server.post("/free", {"free_memory": True})
    page.set(SAMPLER_ID, seed=count)
    assert page.run() == "success"
    page.wait_for_state(LAYOUT_ID, "Not compiled. On two H200, 'compile' took 16 s once")
    return page.states()


def test_first_run(page: Page, gpus: Gpus, server: ComfyServer, tmp_path: Path):
    # The second page finds the workers of the last count up.
    for count in (1, 3, 2) if page.classic else (2,):
        gpus.set(count)
        states = run_fresh(page, server, count)
        page.screenshot(tmp_path)
        assert set(states) == {LAYOUT_ID, LOADER_ID}
        assert f" of {count} GPU(s): about " in states[LAYOUT_ID]
        assert ("exchanges by copy engines" in states[LAYOUT_ID]) == (count > 1)
        chosen, name = states[LAYOUT_ID].split()[:2]
        assert chosen == "Chosen"
        ready, took = states[LOADER_ID].split("\n")
        assert ready == f"ready: {name} on {count} CPU process{'' if count == 1 else 'es'}"
        assert re.fullmatch(r"started in [\d.]+ s \(imports [\d.]+\), loaded in [\d.]+ s", took)
        assert max(worker_ranks(server).values()) + 1 >= count
    assert page.frontend.errors == []


def test_each_problem_is_told_once(page: Page, server: ComfyServer):
    before = page.states()
    page.set(LAYOUT_ID, devices="gpu two")
    page.press_run()
    page.frontend.page.wait_for_function("() => app.lastNodeErrors", timeout=WAIT)
    ((node, found),) = page.frontend.call("() => app.lastNodeErrors").items()
    (error,) = found["errors"]
    assert (node, error["extra_info"]["input_name"]) == (LAYOUT_ID, "devices")
    assert "cannot read the device 'gpu two'" in error["details"]
    if not page.classic:
        page.frontend.page.wait_for_function(f"() => {RED} === 1")
    assert page.states() == before  # the workers are as they were
    # What one value alone cannot tell is told when the node runs, with values to type in, and without a Python path.
    page.set(LAYOUT_ID, devices="auto", auto=False, ulysses=2, tp=2)
    text = page.run()
    assert text.startswith("ValueError: the layout has 4 ranks but this machine has 2 GPU(s)")
    assert "such as ulysses 1, ring 1, tp 2" in text
    page.set(LAYOUT_ID, ulysses=1)
    assert page.run() == "success"
    page.wait_for_state(LOADER_ID, "ready: TP-2 on 2 CPU processes")
    assert set(page.states()) == {LOADER_ID}  # nothing was chosen
    page.set(LAYOUT_ID, auto=True)


@ANY_LOOK
def test_gpus_that_slow_each_other_down(page: Page, gpus: Gpus, server: ComfyServer):
    """Over slow links fewer are faster: an automatic layout takes fewer, and one that is set by hand says so."""
    gpus.set(4, "PHB")  # what was chosen for two is kept
    states = run_fresh(page, server, 12)
    assert "single of 1 GPU(s): about " in states[LAYOUT_ID]
    assert " of all 4 would take " in states[LAYOUT_ID]
    page.set(LAYOUT_ID, auto=False, ulysses=1, tp=2)
    assert page.run() == "success"
    page.wait_for_state(LAYOUT_ID, "SLOWER than fewer GPUs: single on GPU 0 would take ")
    assert "Parallel Layout: TP-2: about " in server.log_text()
    gpus.set(2)
    page.set(LAYOUT_ID, auto=True)
    run_fresh(page, server, 13)


@ANY_LOOK
def test_a_latent_of_another_kind_is_told_at_once(page: Page, server: ComfyServer):
    """With the node to use instead; the workers are as they were."""
    assert page.run() == "success"
    page.wait_for_state(LOADER_ID, "ready: ")
    page.wait_for_state(LAYOUT_ID, "Not compiled")  # within a second of the picture
    before, ranks = page.states(), worker_ranks(server)
    page.frontend.page.evaluate(VIDEO_LATENT, SAMPLER_ID)
    text = page.run()
    page.frontend.page.evaluate(CONNECT, [LATENT_ID, SAMPLER_ID])  # now: the next test needs it, whatever comes of this
    assert text.startswith("ValueError: the latent has the shape [1, 128, 2, 4, 4] (a video)")
    assert "use EmptyFlux2LatentImage" in text
    assert page.states() == before
    assert worker_ranks(server) == ranks
    assert page.run() == "success"


@ANY_LOOK
def test_state_is_true_in_every_tab(page: Page, server: ComfyServer, tmp_path: Path):
    assert page.run() == "success"
    page.wait_for_state(LOADER_ID, "ready: ")
    with page.another() as other:
        # A tab that is opened later knows it without a run, and both hear that a worker was killed.
        other.wait_for_state(LOADER_ID, "ready: ")
        for process in (*worker_ranks(server), *fork_servers(server)):  # other groups', too
            os.kill(process, signal.SIGKILL)
        for tab in (page, other):
            tab.wait_for_state(LOADER_ID, "not running: the next run starts the workers")
        # Cancel while they start, which takes seconds now: that is said, in both, and the next run goes on.
        page.set(SAMPLER_ID, seed=99)
        page.press_run()
        page.wait_for_state(LOADER_ID, "starting: ")
        server.interrupt()
        page.frontend.page.wait_for_function("() => ended", timeout=WAIT)
        assert page.frontend.call("() => ended") == "interrupted"
        for tab in (page, other):
            tab.wait_for_state(LOADER_ID, "still starting: the next run waits for the rest")
        assert page.run() == "success"
        for tab in (page, other):
            tab.wait_for_state(LOADER_ID, "ready: ")
    # A copy of the workflow, whose loader is not run again, has the state of the one that ran it.
    copy = json.loads(WORKFLOW.read_text()) | {"id": f"33333333-3333-4333-8333-33333333333{int(page.classic)}"}
    file = tmp_path / "copy.json"
    file.write_text(json.dumps(copy))
    drop(page.frontend, file)
    assert page.states() == {}
    assert page.run() == "success"
    page.wait_for_state(LOADER_ID, "ready: ")
