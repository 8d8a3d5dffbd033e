"""What a new user sees: templates with pictures, the demo after Run, and FLUX.2's workflow with links to its files.

``HYBRID_DIT_SCREENSHOTS=docs/images python -m pytest tests/browser/test_screenshots.py`` makes the README's pictures.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from scripts.save_workflows import MODELS

from ..comfyui.server import CHECKOUT, HOW_TO_GET, PACK_NAME, ComfyServer, find_comfyui
from .frontend import Frontend, what_is_missing
from .test_drag_and_drop import HAS_PICTURE, LISTEN, RUN_SECONDS, drop

DEMO, FLUX2 = "01_demo_text_to_image", "06_flux2_text_to_image"
NAMES = sorted(file.stem for file in (CHECKOUT / "workflows").glob("*.json"))

PICTURES = """[...document.querySelectorAll('[role=dialog] img')].map(({ alt, naturalWidth }) => ({
  name: alt, width: naturalWidth }))"""
HELP = ".node-help-content"
# What is wider than its place, or out of the panel.
CUT = f"""() => {{
  const panel = document.querySelector("{HELP}"), {{ right }} = panel.getBoundingClientRect();
  return [panel, ...panel.querySelectorAll("*")]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth || e.getBoundingClientRect().right > right + 1)
    .map(e => e.textContent.slice(0, 80));
}}"""

pytestmark = [
    pytest.mark.skipif(find_comfyui() is None, reason=HOW_TO_GET),
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def frontend(server: ComfyServer) -> Iterator[Frontend]:
    with Frontend(server) as frontend:
        yield frontend


def keep(frontend: Frontend, name: str, tmp_path: Path) -> Path:
    """Save a screenshot, small enough for a README: where ``$HYBRID_DIT_SCREENSHOTS`` says, or for the test alone."""
    folder = Path(os.environ.get("HYBRID_DIT_SCREENSHOTS", tmp_path))
    picture = Image.open(io.BytesIO(frontend.page.screenshot())).convert("RGB")
    file = folder / f"{name}.png"
    picture.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
    assert 10_000 < file.stat().st_size < 200_000
    return file


def test_templates_have_pictures(server: ComfyServer):
    """As the template browser asks for them."""
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == NAMES
    for name in NAMES:
        with Image.open(io.BytesIO(server.request(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg"))) as picture:
            assert picture.format == "JPEG"
        assert server.get(f"/api/workflow_templates/{PACK_NAME}/{name}.json")["nodes"]


def test_templates_can_be_told_apart(frontend: Frontend):
    """In the template browser: names that say what runs at once, and pictures that have arrived."""
    frontend.call("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = frontend.page.get_by_role("dialog").first
    dialog.get_by_text(PACK_NAME, exact=True).first.click()
    for name in NAMES:
        dialog.get_by_text(name, exact=True).wait_for()
    frontend.page.wait_for_function(f"() => {PICTURES}.length >= 8 && {PICTURES}.every(({{ width }}) => width > 200)")
    names = {picture["name"] for picture in frontend.call(f"() => {PICTURES}")}
    assert names <= set(NAMES)
    frontend.page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")


@pytest.mark.parametrize("workflow", ["05_demo_block_cache", FLUX2])
def test_help_pages_are_not_cut(frontend: Frontend, workflow: str):
    """In the narrow panel beside the canvas."""
    drop(frontend, CHECKOUT / "workflows" / f"{workflow}.json")
    ours = frontend.call("() => app.graph.nodes.filter(n => n.type.startsWith('HybridDiT_')).map(n => n.id)")
    assert len(ours) >= 3
    for node in ours:
        frontend.call("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
        if not frontend.page.locator(HELP).is_visible():
            frontend.page.get_by_test_id("info-button").click()
        title = frontend.call("id => app.graph.getNodeById(id).title", node)
        frontend.page.locator(HELP).get_by_role("heading", name=title, exact=True).first.wait_for()
        assert frontend.call(f"() => document.querySelector('{HELP}').clientWidth") < 400
        assert frontend.call(CUT) == []


def test_missing_files_are_offered(frontend: Frontend):
    drop(frontend, CHECKOUT / "workflows" / f"{FLUX2}.json")
    text = frontend.page.locator("body").inner_text()
    for name in ("flux2_dev_fp8mixed", "mistral_3_small_flux2_fp8", "flux2-vae"):
        assert f"{name}.safetensors" in text


def test_flux2(frontend: Frontend, server: ComfyServer, tmp_path: Path):
    for file, address in MODELS.items():
        path = server.models / address.rpartition("/")[2] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    frontend.page.reload()
    frontend.page.wait_for_function("() => window.app?.vueAppReady && window.app.extensionManager", timeout=60_000)
    frontend.page.wait_for_timeout(1500)
    drop(frontend, CHECKOUT / "workflows" / f"{FLUX2}.json")
    keep(frontend, "flux2", tmp_path)


def test_demo_runs(frontend: Frontend, tmp_path: Path):
    drop(frontend, CHECKOUT / "workflows" / f"{DEMO}.json")
    frontend.page.evaluate(LISTEN)
    frontend.page.get_by_test_id("queue-button").click()
    frontend.page.wait_for_function("() => heard.ended", timeout=RUN_SECONDS * 1000)
    assert frontend.call("() => heard.ended") == "success"
    frontend.page.wait_for_function(HAS_PICTURE, timeout=20_000)
    frontend.page.wait_for_timeout(1000)
    keep(frontend, "demo", tmp_path)
