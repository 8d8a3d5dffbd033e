#!/usr/bin/env python
"""Makes workflows/<name>.json (as the UI saves it, to be dropped onto it) and its picture from workflows/api.

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
from tests.comfyui.graphs import run_well  # noqa: E402
from tests.comfyui.server import HOW_TO_GET, ComfyServer, find_comfyui  # noqa: E402

FOLDER = CHECKOUT / "workflows"
EXAMPLE_IMAGE = "hybrid-dit-example.png"

OURS = "Hybrid DiT"
COLUMNS: list[tuple[int, dict[str, list[str]]]] = [
    (330, {OURS: ["HybridDiT_ParallelLayout"]}),
    (
        330,
        {
            "Models": [
                *["HybridDiT_LoadPipeline", "HybridDiT_LoadDiffusionModel", "HybridDiT_LoadCLIP", "CLIPLoader"],
                *["VAELoader", "LoraLoaderModelOnly", "HybridDiT_BlockCache"],
            ],
            "Mask: the left half is kept": ["SolidMask", "MaskComposite"],
        },
    ),
    (
        290,
        {
            "Input image": [
                *["LoadImage", "FluxKontextImageScale", "ImageScaleToTotalPixels", "GetImageSize", "VAEEncode"],
                "SetLatentNoiseMask",
            ]
        },
    ),
    (
        330,
        {
            "Prompt": [
                *["CLIPTextEncode", "TextEncodeQwenImageEditPlus", "FluxKontextMultiReferenceLatentMethod"],
                *["ConditioningZeroOut", "FluxGuidance", "ReferenceLatent"],
                *["EmptyFlux2LatentImage", "EmptySD3LatentImage", "EmptyHunyuanLatentVideo"],
            ]
        },
    ),
    (
        290,
        {
            "Sampling": [
                *["RandomNoise", "KSamplerSelect", "Flux2Scheduler", "BasicGuider", "CFGGuider"],
                *["SamplerCustomAdvanced", "ModelSamplingAuraFlow", "ModelSamplingSD3", "CFGNorm", "KSampler"],
                "KSamplerAdvanced",
            ]
        },
    ),
    (
        330,
        {
            "Result": [
                "VAEDecode",
                "ImageStitch",
                "SaveImage",
                "CreateVideo",
                "SaveVideo",
                "HybridDiT_WorkersReport",
                "HybridDiT_UnloadWorkers",
            ]
        },
    ),
]
"""From left to right: the nodes' width, and group boxes with their nodes, from top to bottom. The note stands first."""
HEIGHTS = {
    **{"HybridDiT_ParallelLayout": 400, "HybridDiT_LoadPipeline": 220, "HybridDiT_WorkersReport": 240},
    **{"HybridDiT_LoadDiffusionModel": 180, "HybridDiT_LoadCLIP": 220, "HybridDiT_BlockCache": 290},
    **{"CLIPTextEncode": 110, "TextEncodeQwenImageEditPlus": 180, "LoadImage": 340, "SaveImage": 350},
}
"""Of nodes that show more than the frontend reckons with: a state, a picture, or a badge in Nodes 2.0."""
OURS_COLOUR, OTHER_COLOUR = "#3f789e", "#8a8a8a"

TITLE, GAP, PADDING, COLUMN_GAP, MARGIN = 30, 24, 16, 40, 20

VIEW_WIDTH, LEAST_SCALE, VIEW_OFFSET = 1500, 0.7, [90, 125]
"""Pixels of a usual screen beside the side bar, the scale at which text can be read, and where the left top goes."""

FILES = "https://huggingface.co/Comfy-Org/flux2-dev/resolve/main/split_files"
QWEN_FILES = "https://huggingface.co/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files"
EDIT_FILES = "https://huggingface.co/Comfy-Org/Qwen-Image-Edit_ComfyUI/resolve/main/split_files"
Z_IMAGE_FILES = "https://huggingface.co/Comfy-Org/z_image_turbo/resolve/main/split_files"
WAN_FILES = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
WAN_TEXT_FILES = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
KLEIN_FILES = "https://huggingface.co/Comfy-Org/flux2-klein/resolve/main/split_files"
MODELS = {
    "flux2_dev_fp8mixed.safetensors": f"{FILES}/diffusion_models",
    "mistral_3_small_flux2_fp8.safetensors": f"{FILES}/text_encoders",
    "flux2-vae.safetensors": f"{FILES}/vae",
    "qwen_image_fp8_e4m3fn.safetensors": f"{QWEN_FILES}/diffusion_models",
    "qwen_image_2512_fp8_e4m3fn.safetensors": f"{QWEN_FILES}/diffusion_models",
    "qwen_image_edit_2511_fp8mixed.safetensors": f"{EDIT_FILES}/diffusion_models",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": f"{QWEN_FILES}/text_encoders",
    "qwen_image_vae.safetensors": f"{QWEN_FILES}/vae",
    "z_image_turbo_bf16.safetensors": f"{Z_IMAGE_FILES}/diffusion_models",
    "flux-2-klein-4b.safetensors": f"{KLEIN_FILES}/diffusion_models",
    "qwen_3_4b.safetensors": f"{Z_IMAGE_FILES}/text_encoders",
    "ae.safetensors": f"{Z_IMAGE_FILES}/vae",
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": f"{WAN_FILES}/diffusion_models",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": f"{WAN_FILES}/diffusion_models",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": f"{WAN_TEXT_FILES}/text_encoders",
    "wan_2.1_vae.safetensors": f"{WAN_FILES}/vae",
}
"""Files that ComfyUI's own templates name -> where they are to be had. The front end offers to download what is missing
when a loader's `properties.models` says so; ComfyUI's folder is the last part of the address."""

# No code spans: on a coloured note, Nodes 2.0 shows them blue on blue.
NOTE_HEIGHT, LINE_HEIGHT = 240, 20
INPUT_NOTE = f"""
**First** copy *workflows/{EXAMPLE_IMAGE}* into ComfyUI's *input* folder, or drop it onto *Load Image*.
"""
DEMO_NOTE_END = """
Runs at once, also without a GPU. For the real FLUX.2 open *06_flux2_text_to_image*, or pick a diffusers folder \
(such as FLUX.2-dev in *models/diffusers*) as *pipeline*, with 1024 x 1024 and 28 to 50 steps.
"""
FILES_NOTE_END = """
What is missing can be downloaded from the dialog that ComfyUI shows, or from these links, into \
*models/* and the folder in brackets.
"""
NOTES = {
    "01_demo_text_to_image": """\
## Text to image on many GPUs
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. All GPUs \
together compute each step of the small demo model; *Parallel Layout* shows how.
""",
    "02_demo_edit": """\
## Edit a picture
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. The picture goes in as \
a reference latent, whose tokens are split over all GPUs, too.
""",
    "03_demo_inpaint": """\
## Inpaint half of a picture
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. The noise mask lets \
all GPUs together repaint the right half only.
""",
    "04_demo_custom_sampler": """\
## Custom sampling, with a report
*Parallel Layout*, *Load Pipeline (Parallel)* and *Workers Report* are Hybrid DiT's; all others are stock nodes. All \
GPUs together compute a wide picture; the report has the seconds and the memory of each.
""",
    "05_demo_block_cache": """\
## Text to image with the block cache
*Parallel Layout*, *Load Pipeline (Parallel)* and *Block Cache* are Hybrid DiT's; all others are stock nodes. Steps \
that hardly differ from the last computed one skip most blocks; *Block Cache* shows which. Bypass it to compare.
""",
    "06_flux2_text_to_image": """\
## FLUX.2-dev on many GPUs
Stock nodes but for *Parallel Layout* and the two *(Parallel)* loaders, which split model and text encoder over all \
GPUs in the fastest way that fits.
""",
    "07_flux2_edit": """\
## Edit with FLUX.2-dev on many GPUs
Choose a picture in *Load Image*; it is scaled to a megapixel and goes in as a reference latent. More pictures: chain \
more *ReferenceLatent* nodes.
""",
    "08_qwen_image": """\
## Qwen-Image on many GPUs
ComfyUI's template without Lightning's LoRA: 20 steps, CFG 4. *Parallel Layout* and the two *(Parallel)* loaders split \
model and text encoder over all GPUs in the fastest way that fits.
""",
    "09_qwen_image_2512": """\
## Qwen-Image-2512 on many GPUs
ComfyUI's template without Lightning's LoRA: 50 steps, CFG 4. *Parallel Layout* and the two *(Parallel)* loaders split \
model and text encoder over all GPUs in the fastest way that fits.
""",
    "10_qwen_image_edit_2511": """\
## Edit with Qwen-Image-Edit-2511 on many GPUs
ComfyUI's template without Lightning's LoRA: 40 steps, CFG 4. Choose a picture in *Load Image*; more pictures go into \
*image2* and *image3* of both prompts.
""",
    "11_z_image_turbo": """\
## Z-Image-Turbo on many GPUs
ComfyUI's template. *Parallel Layout* and *Load Diffusion Model (Parallel)* split the model over all GPUs; text \
encoder and VAE are loaded by ComfyUI's own nodes.
""",
    "14_flux2_lora": """\
## A LoRA at three strengths
*Parallel Layout* and *Load Pipeline (Parallel)* are Hybrid DiT's; all others are stock nodes. The demo's outline LoRA \
at 0, 0.5 and 1, side by side; *Load Pipeline* says which one is on. It comes along, and the loaders list it.
""",
    "12_flux2_klein": """\
## FLUX.2 klein on many GPUs
ComfyUI's template of the distilled 4B model. *Parallel Layout* and *Load Diffusion Model (Parallel)* split it over \
all GPUs; text encoder and VAE are loaded by ComfyUI's own nodes. For 9B choose its files.
""",
    "13_wan2_2_text_to_video": """\
## A video with Wan 2.2 on many GPUs
ComfyUI's template without lightx2v's LoRAs: 20 steps, CFG 3.5. *Parallel Layout* and the two *Load Diffusion Model \
(Parallel)* split both experts over all GPUs; text encoder and VAE are loaded by ComfyUI's own nodes.
""",
}

ARRANGE = """({ nodes, groups, note, title }) => {
  const graph = app.graph;
  for (const { id, pos, size, widgets, models } of nodes) {
    const node = graph.getNodeById(id);
    node.pos = pos;
    node.setSize(size);
    if (models.length) node.properties.models = models;
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
    """Where everything goes: nodes in group boxes, boxes in columns, and the note above the first box."""
    left = dict(workflow)
    nodes: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    text, height = note_of(workflow, name)
    note_size = [COLUMNS[0][0] + 2 * PADDING, height]
    note = {"id": max(map(int, workflow)) + 1, "pos": [0, TITLE], "size": note_size, "text": text}
    x, top = 0, TITLE + height + GAP
    for width, boxes in COLUMNS:
        box_width = width + 2 * PADDING
        for title, kinds in boxes.items():
            y = top + TITLE + PADDING
            for kind in kinds:
                for key in [key for key, node in left.items() if node["class_type"] == kind]:
                    size = [width, max(round(sizes[key][1]), HEIGHTS.get(kind, 0))]
                    # "fixed": the example has to come out alike each time.
                    widgets = {"control_after_generate": "fixed"}
                    node = {"id": int(key), "pos": [x + PADDING, y + TITLE], "size": size, "widgets": widgets}
                    nodes.append({**node, "models": models_of(left.pop(key))})
                    y += TITLE + size[1] + GAP
            if y > top + TITLE + PADDING:
                colour = OURS_COLOUR if title == OURS else OTHER_COLOUR
                bounding = [x, top, box_width, y - GAP + PADDING - top]
                groups.append({"title": title, "bounding": bounding, "color": colour})
                top += bounding[3] + GAP
        if top:
            x += box_width + COLUMN_GAP
        top = 0
    if left:
        raise ValueError(f"{name}: no column for {', '.join(node['class_type'] for node in left.values())}")
    return {"nodes": nodes, "groups": groups, "note": note, "title": f"Hybrid DiT: {name}"}


def right_of(plan: dict[str, Any]) -> float:
    """The right edge of a plan's group boxes."""
    return max(group["bounding"][0] + group["bounding"][2] for group in plan["groups"])


def models_of(node: dict[str, Any]) -> list[dict[str, str]]:
    """The files that a node of an API workflow loads, as `properties.models` has them."""
    names = [value for value in node["inputs"].values() if isinstance(value, str) and value in MODELS]
    return [{"name": n, "url": f"{MODELS[n]}/{n}", "directory": MODELS[n].rpartition("/")[2]} for n in names]


def note_of(workflow: dict[str, Any], name: str) -> tuple[str, int]:
    """The note's text and height."""
    models = [model for node in workflow.values() for model in models_of(node)]
    links = "".join(f"- [{model['name']}]({model['url']}) ({model['directory']})\n" for model in models)
    text = NOTES[name] + (INPUT_NOTE if uses_example(workflow) else "")
    text += f"{FILES_NOTE_END}\n{links}" if models else DEMO_NOTE_END
    return text, NOTE_HEIGHT + LINE_HEIGHT * (3 * uses_example(workflow) + 2 * len(models))


def uses_example(workflow: dict[str, Any]) -> bool:
    return any(node["inputs"].get("image") == EXAMPLE_IMAGE for node in workflow.values())


def steady(graph: dict[str, Any], name: str, width: float) -> dict[str, Any]:
    """The saved graph without what differs from one saving to the next, and opening on its left, to be read."""
    graph = {**graph, "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hybrid-dit/workflows/{name}"))}
    # Without a view, the frontend shows the whole graph, so small that it cannot be read.
    scale = round(min(0.9, max(LEAST_SCALE, VIEW_WIDTH / width)), 2)
    graph["extra"] = {**graph["extra"], "ds": {"scale": scale, "offset": VIEW_OFFSET}}
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
    """A red circle in the left half, in sizes and colours that the demo model knows; drawn large for smooth edges."""
    factor = 8
    picture = Image.new("RGB", (256 * factor, 256 * factor), (140, 140, 140))
    ImageDraw.Draw(picture).ellipse([edge * factor for edge in (18, 77, 120, 179)], fill=(220, 35, 40))
    return picture.resize((256, 256), Image.Resampling.LANCZOS)


def thumbnail(server: ComfyServer, frontend: Frontend, plan: dict[str, Any], workflow: dict[str, Any]) -> Image.Image:
    """What ComfyUI's template browser shows: the workflow's result, or the graph where that needs files of its own."""
    if any(node["models"] for node in plan["nodes"]):
        boxes = [group["bounding"] for group in plan["groups"]] + [[*plan["note"]["pos"], *plan["note"]["size"]]]
        bottom = max(box[1] + box[3] for box in boxes)
        return screenshot(frontend, [-MARGIN, 0, right_of(plan) + 2 * MARGIN, bottom + MARGIN], width=800)
    (file,) = run_well(server, workflow, timeout=600).files()
    return server.image(**file).convert("RGB")


def save(server: ComfyServer, frontend: Frontend, name: str) -> bool:
    """Make and check one workflow; whether it was written."""
    workflow = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    frontend.page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [workflow, name])
    frontend.page.wait_for_timeout(500)
    sizes = frontend.call("() => Object.fromEntries(app.graph.nodes.map(n => [n.id, [...n.computeSize()]]))")
    plan = arrange(workflow, sizes, name)
    frontend.page.evaluate(ARRANGE, plan)
    frontend.page.wait_for_timeout(500)
    graph = steady(frontend.graph(), name, right_of(plan))

    frontend.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
    frontend.page.wait_for_timeout(1000)
    prompt, wanted = without_meta(frontend.prompt()), without_meta(workflow)
    for key in sorted(prompt.keys() | wanted.keys(), key=int):
        if prompt.get(key) != wanted.get(key):
            print(f"{name}: node {key} is {prompt.get(key)}, in the API file it is {wanted.get(key)}")
    if prompt != wanted:
        return False
    scale = frontend.call("() => app.canvas.ds.scale")
    (FOLDER / f"{name}.json").write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n")
    picture = thumbnail(server, frontend, plan, workflow)
    picture.save(FOLDER / f"{name}.jpg", quality=85, optimize=True)
    print(f"{name}: {len(workflow)} nodes, opens at {scale:.2f}, picture {picture.width} x {picture.height}")
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
        for image in (EXAMPLE_IMAGE, "example.png"):  # the second comes with ComfyUI
            server.add_input_image(image, example)
        for file, url in MODELS.items():
            path = server.models / url.rpartition("/")[2] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        # No simplified drawing at small scales.
        server.post("/settings", {"LiteGraph.Canvas.MinFontSizeForLOD": 0})
        with Frontend(server) as frontend:
            saved = [save(server, frontend, name) for name in names]
    return 0 if all(saved) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
