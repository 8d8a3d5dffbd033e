"""ComfyUI's real frontend in a headless Chromium, for the browser tests and for scripts/save_workflows.py."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..comfyui.server import ComfyServer

SETTINGS = {
    # Else the template browser covers the canvas of a new user.
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.VueNodes.Enabled": False,
}
"""What a user has who has been here before, and the classic nodes, whose look does not depend on the release."""

READY = "() => window.app?.vueAppReady && window.app.rootGraphInternal && window.app.extensionManager"

OPENED = "app.extensionManager.workflow?.activeWorkflow"
"""What has a tab of the frontend: set, with the graph's state, when all of a graph is there."""

# The same workflow that is opened again keeps its tab, and gets nodes and a state anew.
MARK = f"() => {{ window.before = [...app.graph.nodes, {OPENED}.activeState]; }}"
ANOTHER = f"""id => app.graph.id === id && {OPENED}?.activeState?.id === id &&
  ![...app.graph.nodes, {OPENED}.activeState].some(one => window.before.includes(one))"""

# As a file manager would do it: the file travels in the DataTransfer of a real drop event on the canvas.
DROP = """async ({ name, type, data }) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const canvas = app.canvas.canvas, box = canvas.getBoundingClientRect();
  for (const kind of ["dragenter", "dragover", "drop"])
    canvas.dispatchEvent(new DragEvent(kind, {
      bubbles: true, cancelable: true, dataTransfer: transfer,
      clientX: box.x + box.width / 2, clientY: box.y + box.height / 2,
    }));
}"""


def find_chromium() -> str | None:
    """``$CHROMIUM``, or the first Chromium or Chrome on the path."""
    chosen = os.environ.get("CHROMIUM")
    if chosen:
        return chosen if Path(chosen).is_file() else None
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def what_is_missing() -> str | None:
    """Why no browser can be started here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "no playwright: python -m pip install playwright (its own browsers are not needed)"
    if find_chromium() is None:
        return "no Chromium: install the package chromium, or set CHROMIUM to its executable"
    return None


class Frontend:
    """One page of the frontend of a running server. A context manager.

    Args:
        server: a started server. Its user settings are those above.
        width, height: the page's size.
        vue_nodes: nodes as HTML elements ("Nodes 2.0") rather than on the canvas.
    """

    def __init__(self, server: ComfyServer, *, width: int = 1600, height: int = 900, vue_nodes: bool = False) -> None:
        self.server = server
        self.width, self.height = width, height
        self.settings = {**SETTINGS, "Comfy.VueNodes.Enabled": vue_nodes}
        self.errors: list[str] = []
        """Exceptions in the page, and errors on its console other than of files that are not there."""

    def __enter__(self) -> Frontend:
        from playwright.sync_api import sync_playwright

        self.server.post("/settings", self.settings)
        self._playwright = sync_playwright().start()
        try:
            self._browser = self._playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
            self._open()
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def _open(self) -> None:
        self.page = self._browser.new_page(viewport={"width": self.width, "height": self.height})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(self.server.url)
        self.wait_until_open()

    def wait_until_open(self) -> None:
        """Wait until the page, which was opened or loaded again, takes another workflow."""
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.wait_for_selector("#graph-canvas", timeout=60_000)
        # The frontend opens a workflow of its own last; what is loaded before would be replaced.
        self.page.wait_for_function(f"() => {OPENED}?.activeState", timeout=60_000)
        # It asks for the sizes of that workflow's files, and errors of this come a little later.
        self.page.wait_for_timeout(1500)

    @contextmanager
    def another_tab(self) -> Iterator[Frontend]:
        """A second page of the same server, as somebody else opens it."""
        other = Frontend(self.server, width=self.width, height=self.height)
        other.settings, other._browser = self.settings, self._browser
        other._open()
        try:
            yield other
        finally:
            other.page.close()

    def __exit__(self, *_: object) -> None:
        self._browser.close()
        self._playwright.stop()

    def _console(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def call(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript function in the page, by way of JSON, so without ``undefined``."""
        wrapped = f"async argument => JSON.stringify((await ({script})(argument)) ?? null)"
        return json.loads(self.page.evaluate(wrapped, argument))

    def drop(self, file: Path, mime_type: str = "application/json") -> None:
        """Drop a file onto the middle of the canvas."""
        data = base64.b64encode(file.read_bytes()).decode()
        self.page.evaluate(DROP, {"name": file.name, "type": mime_type, "data": data})

    def wait_for_another(self, act: Callable[[], None], graph: str) -> None:
        """Do what opens another workflow, and wait until the graph with this id is whole, with what it lacks told."""
        self.page.evaluate(MARK)
        act()
        self.page.wait_for_function(ANOTHER, arg=graph, timeout=20_000)

    def graph(self) -> dict[str, Any]:
        """The open workflow in UI format, as its menu would save it."""
        return self.call("async () => (await app.graphToPrompt()).workflow")

    def prompt(self) -> dict[str, Any]:
        """The open workflow in API format, as it would be queued."""
        return self.call("async () => (await app.graphToPrompt()).output")
