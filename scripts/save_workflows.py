#!/usr/bin/env python
"""Makes workflows/<name>.json (as the UI saves it, to be dropped onto it) and a picture of it from workflows/api.

ComfyUI's own frontend does the conversion, in a headless Chromium on a real server with this checkout. So this needs
what the browser tests need: a ComfyUI (see tests/comfyui/server.py), Chromium, and ``pip install playwright``::

    python scripts/save_workflows.py [name ...]

The node ids are those of the API file. A note and group boxes are added, which only the UI has. What was saved is
loaded again and has to give the API file back, else nothing is written for it and the exit status is 1.
"""

from __future__ import annotations

import io
import json
import sys
import uuid
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from tests.browser.frontend import Frontend, what_is_missing  # noqa: E402
from tests.comfyui.server import HOW_TO_GET, ComfyServer, find_comfyui  # noqa: E402

FOLDER = CHECKOUT / "workflows"
EXAMPLE_IMAGE = "hybrid-dit-example.png"

OURS = "Hybrid DiT"
COLUMNS: list[tuple[int, dict[str, list[str]]]] = [
    (300, {OURS: ["HybridDiT_ParallelLayout", "HybridDiT_LoadPipeline", "HybridDiT_BlockCache"]}),
    (
        320,
        {
            "Prompt": ["CLIPTextEncode", "FluxGuidance", "EmptyFlux2LatentImage"],
            "Mask: the left half is kept": ["SolidMask", "MaskComposite"],
        },
    ),
    (280, {"Input image": ["LoadImage", "VAEEncode", "ReferenceLatent", "SetLatentNoiseMask"]}),
    (
        280,
        {
            "Sampling": [
                *["RandomNoise", "KSamplerSelect", "Flux2Scheduler", "BasicGuider", "SamplerCustomAdvanced"],
                "KSampler",
            ]
        },
    ),
    (320, {"Result": ["VAEDecode", "SaveImage", "HybridDiT_WorkersReport", "HybridDiT_UnloadWorkers"]}),
]
"""From left to right: the nodes' width, and group boxes with their nodes, from top to bottom."""
HEIGHTS = {
    **{"HybridDiT_ParallelLayout": 380, "HybridDiT_LoadPipeline": 220, "HybridDiT_WorkersReport": 240},
    **{"HybridDiT_BlockCache": 290},
    **{"CLIPTextEncode": 110, "LoadImage": 340, "SaveImage": 350},
}
"""Of nodes that show more than the frontend reckons with: a state, a picture, or a badge in Nodes 2.0."""
OURS_COLOUR, OTHER_COLOUR = "#3f789e", "#8a8a8a"

TITLE, GAP, PADDING, COLUMN_GAP = 30, 24, 16, 40

# No code spans: on a coloured note, Nodes 2.0 shows them blue on blue.
NOTE_HEIGHT, INPUT_NOTE_HEIGHT = 240, 60
NOTE_END = """
**For the real FLUX.2:** put the diffusers folder (such as FLUX.2-dev) into *models/diffusers*, pick it as *pipeline*, \
and take 1024 x 1024 and 28 to 50 steps. The layout stays automatic, or is set by degrees.
"""
INPUT_NOTE = f"""
**First** copy *workflows/{EXAMPLE_IMAGE}* into ComfyUI's *input* folder, or drop it onto *Load Image*.
"""
NOTES = {
    "flux2_text_to_image": """\
## Text to image on many GPUs
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. All GPUs \
together compute each step of the small demo model (or the CPU if there is no GPU); *Parallel Layout* shows how.
""",
    "flux2_text_to_image_cached": """\
## Text to image with the block cache
*Parallel Layout*, *Load Pipeline (Parallel)* and *Block Cache* are Hybrid DiT's; all others are stock nodes. Steps \
that hardly differ from the last computed one skip most blocks; *Block Cache* shows which. Bypass it to compare.
""",
    "flux2_custom_sampler": """\
## Custom sampling, with a report
*Parallel Layout*, *Load Pipeline (Parallel)* and *Workers Report* are Hybrid DiT's; all others are stock nodes. All \
GPUs together compute a wide picture; the report has the seconds and the memory of each.
""",
    "flux2_edit": """\
## Edit a picture
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. The picture goes in as \
a reference latent, whose tokens are split over all GPUs, too.
""",
    "flux2_inpaint": """\
## Inpaint half of a picture
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. The noise mask lets \
all GPUs together repaint the right half only.
""",
}

ARRANGE = """({ nodes, groups, note, title }) => {
  const graph = app.graph;
  for (const { id, pos, size, widgets } of nodes) {
    const node = graph.getNodeById(id);
    node.pos = pos;
    node.setSize(size);
    for (const [name, value] of Object.entries(widgets))
      for (const widget of node.widgets ?? []) if (widget.name === name) widget.value = value;
  }
  const card = LiteGraph.createNode("MarkdownNote");
  card.id = note.id;
  card.title = title;
  card.color = "#432", card.bgcolor = "#653";
  graph.add(card);
  card.pos = note.pos;
  card.setSize(note.size);
  card.widgets[0].value = note.text;
  for (const { title, bounding, color } of groups) {
    const group = new LiteGraph.LGraphGroup(title);
    group.pos = bounding.slice(0, 2);
    group.size = bounding.slice(2);
    group.color = color;
    graph.add(group);
  }
}"""

# Puts the graph's box at the left top corner of what is visible, at a scale, and says where that is on the page.
SHOW = """async ({ box, scale, at }) => {
  app.canvas.deselectAll?.();
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [at[0] / scale - box[0], at[1] / scale - box[1]];
  app.canvas.setDirty(true, true);
}"""


def arrange(workflow: dict[str, Any], sizes: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Where everything goes: nodes in group boxes, boxes in columns, and the note below the first box."""
    left = dict(workflow)
    nodes: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    note: dict[str, Any] = {}
    x = 0
    for width, boxes in COLUMNS:
        box_width = width + 2 * PADDING
        top = 0
        for title, kinds in boxes.items():
            y = top + TITLE + PADDING
            for kind in kinds:
                for key in [key for key, node in left.items() if node["class_type"] == kind]:
                    size = [width, max(round(sizes[key][1]), HEIGHTS.get(kind, 0))]
                    # "fixed": the example has to come out alike each time.
                    widgets = {"control_after_generate": "fixed"}
                    nodes.append({"id": int(key), "pos": [x + PADDING, y + TITLE], "size": size, "widgets": widgets})
                    y += TITLE + size[1] + GAP
                    del left[key]
            if y > top + TITLE + PADDING:
                colour = OURS_COLOUR if title == OURS else OTHER_COLOUR
                bounding = [x, top, box_width, y - GAP + PADDING - top]
                groups.append({"title": title, "bounding": bounding, "color": colour})
                top += bounding[3] + GAP
            if title == OURS:
                text = NOTES[name] + (INPUT_NOTE if uses_input(workflow) else "") + NOTE_END
                height = NOTE_HEIGHT + (INPUT_NOTE_HEIGHT if uses_input(workflow) else 0)
                note = {
                    "id": max(map(int, workflow)) + 1,
                    "pos": [x, top + TITLE],
                    "size": [box_width, height],
                    "text": text,
                }
        if top:
            x += box_width + COLUMN_GAP
    if left:
        raise ValueError(f"{name}: no column for {', '.join(node['class_type'] for node in left.values())}")
    return {"nodes": nodes, "groups": groups, "note": note, "title": f"Hybrid DiT: {name}"}


def uses_input(workflow: dict[str, Any]) -> bool:
    return any(node["class_type"] == "LoadImage" for node in workflow.values())


def steady(graph: dict[str, Any], name: str) -> dict[str, Any]:
    """The saved graph without what differs from one saving to the next."""
    graph = {**graph, "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hybrid-dit/workflows/{name}"))}
    # Without a view, the frontend shows the whole graph.
    graph["extra"] = {key: value for key, value in graph["extra"].items() if key != "ds"}
    # Links are numbered on from one loading to the next.
    numbers = {link[0]: number for number, link in enumerate(graph["links"], start=1)}
    graph["links"] = [[numbers[link[0]], *link[1:]] for link in graph["links"]]
    graph["last_link_id"] = len(numbers)
    for node in graph["nodes"]:
        for slot in node.get("inputs") or []:
            slot["link"] = numbers.get(slot.get("link"))
        for slot in node.get("outputs") or []:
            slot["links"] = [numbers[link] for link in slot.get("links") or []]
    return graph


def without_meta(prompt: dict[str, Any]) -> dict[str, Any]:
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


def picture_of(frontend: Frontend, plan: dict[str, Any], width: int = 1280) -> Image.Image:
    """The graph as the UI shows it, without the UI around it."""
    boxes = [group["bounding"] for group in plan["groups"]] + [[*plan["note"]["pos"], *plan["note"]["size"]]]
    right = max(box[0] + box[2] for box in boxes)
    bottom = max(box[1] + box[3] for box in boxes)
    margin = 20
    return screenshot(frontend, [-margin, -margin, right + 2 * margin, bottom + 2 * margin], width)


def screenshot(frontend: Frontend, box: list[float], width: int) -> Image.Image:
    """The part of the open graph in a box (x, y, width, height), scaled to a width in pixels."""
    scale = width / box[2]
    left, top = 80, 110  # clear of the side bar and the top bar
    frontend.page.set_viewport_size({"width": width + left + 20, "height": round(box[3] * scale) + top + 90})
    frontend.page.wait_for_timeout(500)
    frontend.page.evaluate(SHOW, {"box": box, "scale": scale, "at": [left, top - canvas_top(frontend)]})
    frontend.page.wait_for_timeout(1000)
    clip = {"x": left, "y": top, "width": width, "height": round(box[3] * scale)}
    return Image.open(io.BytesIO(frontend.page.screenshot(clip=clip))).convert("RGB")


def canvas_top(frontend: Frontend) -> float:
    return frontend.call("() => app.canvas.canvas.getBoundingClientRect().y")


def example_image() -> Image.Image:
    """A red circle on grey, drawn large and made smaller for smooth edges."""
    factor = 8
    picture = Image.new("RGB", (256 * factor, 256 * factor), (128, 128, 128))
    ImageDraw.Draw(picture).ellipse([edge * factor for edge in (56, 56, 200, 200)], fill=(220, 30, 30))
    return picture.resize((256, 256), Image.Resampling.LANCZOS)


def save(frontend: Frontend, name: str) -> bool:
    """Make and check one workflow; whether it was written."""
    workflow = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    frontend.page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [workflow, name])
    frontend.page.wait_for_timeout(500)
    sizes = frontend.call("() => Object.fromEntries(app.graph.nodes.map(n => [n.id, [...n.computeSize()]]))")
    plan = arrange(workflow, sizes, name)
    frontend.page.evaluate(ARRANGE, plan)
    frontend.page.wait_for_timeout(500)
    graph = steady(frontend.graph(), name)

    frontend.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
    frontend.page.wait_for_timeout(1000)
    prompt, wanted = without_meta(frontend.prompt()), without_meta(workflow)
    for key in sorted(prompt.keys() | wanted.keys(), key=int):
        if prompt.get(key) != wanted.get(key):
            print(f"{name}: node {key} is {prompt.get(key)}, in the API file it is {wanted.get(key)}")
    if prompt != wanted:
        return False
    (FOLDER / f"{name}.json").write_text(json.dumps(graph, indent=2) + "\n")
    picture = picture_of(frontend, plan)
    picture.save(FOLDER / f"{name}.webp", quality=85, method=6)
    print(f"{name}: {len(workflow)} nodes, picture {picture.width} x {picture.height}")
    return True


def main(names: list[str]) -> int:
    missing = what_is_missing() or (HOW_TO_GET if find_comfyui() is None else None)
    if missing:
        print(missing, file=sys.stderr)
        return 2
    example = example_image()
    example.save(FOLDER / EXAMPLE_IMAGE, optimize=True)
    names = names or sorted(NOTES)
    with ComfyServer() as server:
        server.add_input_image(EXAMPLE_IMAGE, example)
        # No simplified drawing at small scales.
        server.post("/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})
        with Frontend(server) as frontend:
            saved = [save(frontend, name) for name in names]
    return 0 if all(saved) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
