#!/usr/bin/env python
"""Makes workflows/qwen_image*.json (and workflows/api/, and pictures) from ComfyUI's own templates.

Each template is opened in the real front end, its loaders are replaced as by hand, and all else stays as it is; a note
says so. It needs what scripts/save_workflows.py needs, and the templates that come with ComfyUI::

    python scripts/save_templates.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from scripts.save_workflows import FOLDER, example_image, screenshot  # noqa: E402
from tests.browser.edits import move, replace, wire  # noqa: E402
from tests.browser.frontend import Frontend, what_is_missing  # noqa: E402
from tests.comfyui.server import HOW_TO_GET, ComfyServer, find_comfyui  # noqa: E402

TEMPLATES = {
    "qwen_image": "image_qwen_image",
    "qwen_image_2512": "image_qwen_Image_2512",
    "qwen_image_edit_2511": "image_qwen_image_edit_2511",
}
"""Our name -> ComfyUI's."""
ABOVE = 260
"""How far above the model loader the layout goes."""

NOTE = """\
## On many GPUs
This is ComfyUI's own template with two loaders replaced, inside the subgraph: *Load Diffusion Model (Parallel)* and \
*Load CLIP (Parallel)*, both on one *Parallel Layout*, which takes all GPUs in the fastest way that fits.

The workers take no LoRA in this version: leave Lightning's switch off. ComfyUI wants the LoRA's file to be there \
all the same; without it, delete its loader.
"""

ADD_NOTE = """({ title, text, pos, size }) => {
  const card = LiteGraph.createNode("MarkdownNote");
  card.title = title;
  card.color = "#432", card.bgcolor = "#653";
  app.graph.add(card);
  card.pos = pos;
  card.setSize(size);
  card.widgets[0].value = text;
}"""
BOX = """() => {
  const nodes = app.graph.nodes, x = nodes.map(n => n.pos[0]), y = nodes.map(n => n.pos[1]);
  return [Math.min(...x), Math.min(...y)];
}"""
OPEN = """() => {
  const host = app.graph.nodes.find(node => node.subgraph);
  app.canvas.openSubgraph(host.subgraph, host);
  const nodes = host.subgraph.nodes;
  return [Math.min(...nodes.map(n => n.pos[0])), Math.min(...nodes.map(n => n.pos[1] - 30)),
          Math.max(...nodes.map(n => n.pos[0] + n.size[0])), Math.max(...nodes.map(n => n.pos[1] + n.size[1]))];
}"""


def models_of(workflow: dict[str, Any]) -> list[dict[str, str]]:
    """The files that a template says it needs."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    nodes = [node for graph in (workflow, *subgraphs) for node in graph["nodes"]]
    return [model for node in nodes for model in node.get("properties", {}).get("models", [])]


def show(frontend: Frontend, workflow: dict[str, Any], name: str) -> None:
    frontend.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [workflow, name])
    frontend.page.wait_for_function("id => app.graph.id === id", arg=workflow["id"], timeout=20_000)
    frontend.page.wait_for_timeout(1000)


def save(server: ComfyServer, frontend: Frontend, name: str) -> bool:
    """Make one workflow; whether it gave the same prompt when it was opened again."""
    show(frontend, server.get(f"/templates/{TEMPLATES[name]}.json"), name)
    replaced = [
        replace(frontend, "CLIPLoader", "HybridDiT_LoadCLIP", type="qwen_image"),
        replace(frontend, "UNETLoader", "HybridDiT_LoadDiffusionModel"),
    ]
    lost = [slot for one in replaced for slot in one.lost]
    wire(frontend, "HybridDiT_ParallelLayout", "layout")
    move(frontend, "HybridDiT_ParallelLayout", "HybridDiT_LoadDiffusionModel", (0, -ABOVE))
    left, top = frontend.call(BOX)
    size = [400, 300]
    note = {"title": "Hybrid DiT", "text": NOTE, "pos": [left, top - size[1] - 60], "size": size}
    frontend.page.evaluate(ADD_NOTE, note)
    graph, prompt = frontend.graph(), frontend.prompt()
    graph["extra"].pop("ds", None)  # without a view, the front end shows the whole graph
    show(frontend, graph, name)
    if lost or frontend.prompt() != prompt:
        print(f"{name}: lost {lost}, or it is another prompt when it is opened again")
        return False
    (FOLDER / f"{name}.json").write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n")
    (FOLDER / "api" / f"{name}.json").write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n")
    box = frontend.call(OPEN)
    frontend.page.wait_for_timeout(1000)
    picture = screenshot(frontend, [box[0] - 20, box[1] - 20, box[2] - box[0] + 40, box[3] - box[1] + 40], width=1600)
    picture.save(FOLDER / f"{name}.webp", quality=85, method=6)
    print(f"{name}: {len(prompt)} nodes, picture {picture.width} x {picture.height}")
    return True


def main() -> int:
    missing = what_is_missing() or (HOW_TO_GET if find_comfyui() is None else None)
    if missing:
        print(missing, file=sys.stderr)
        return 2
    with ComfyServer() as server:
        for template in TEMPLATES.values():
            workflow = server.get(f"/templates/{template}.json")
            for node in workflow["nodes"]:
                if node["type"] == "LoadImage":
                    server.add_input_image(node["widgets_values"][0], example_image())
            for model in models_of(workflow):
                path = server.models / model["directory"] / model["name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        server.post("/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})
        with Frontend(server) as frontend:
            saved = [save(server, frontend, name) for name in TEMPLATES]
    return 0 if all(saved) else 1


if __name__ == "__main__":
    sys.exit(main())
