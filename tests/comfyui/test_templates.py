"""ComfyUI's own FLUX.2 templates with UNETLoader and CLIPLoader replaced, and nothing else: the same pictures.

Each template is opened in the real front end and changed in the page as by hand. The models have the names that the
template asks for and are small and random, and so has the turbo LoRA.
"""

from __future__ import annotations

import copy
import json
import urllib.error
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.errors import relative_error

from ..browser.edits import Replaced, replace, set_widgets, wire
from ..browser.frontend import Frontend, what_is_missing
from .graphs import run_well
from .server import CHECKOUT, ComfyServer
from .template_models import EXACT, MISTRAL_CONFIG, QWEN3_CONFIG, REFERENCE, STOCK, all_nodes, write_models

LOADER, TEXT_LOADER, LAYOUT = "HybridDiT_LoadDiffusionModel", "HybridDiT_LoadCLIP", "HybridDiT_ParallelLayout"
LORA = "LoraLoaderModelOnly"


SIZES = {
    "image_flux2_text_to_image": (128, 96),
    # 240 x 160 scaled to MEGAPIXELS is 177 x 118, of which whole tokens of 16 x 16 pixels are drawn.
    "image_flux2": (176, 112),
    # Two images, and a text encoder in fp8.
    "image_flux2_fp8": (176, 112),
}
"""Templates, and width and height of their pictures here."""
INPUT_SIZE, MEGAPIXELS = (240, 160), 0.02
OTHER_IMAGE = "other.png"
SWITCH, STEPS = "value", {"20": 2, "8": 3}
"""The subgraph's turbo switch, by which the template chooses a model and a number of steps; and fewer of those."""

# Rounding to 8 bits may differ by one where the latents differ in the fifth digit; two leaves room for another kernel.
MOST, MEAN = 2, 0.5
PARITY = 1e-4
"""Of latents, in fp32: sums in another order."""

pytestmark = [
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]

Prompt = dict[str, Any]


@dataclass
class Edited:
    """A template in API form: as it comes, with ComfyUI's own nodes on small files, and with ours; by the switch.

    Args:
        reopened: ours, off, saved and opened again.
        layout: the layout's key.
        errors: what went wrong in the page.
    """

    name: str
    stock: dict[bool, Prompt]
    reference: dict[bool, Prompt]
    ours: dict[bool, Prompt]
    reopened: Prompt
    text_encoder: Replaced
    model: Replaced
    layout: str
    errors: list[str]


@pytest.fixture(scope="module", autouse=True)
def other_image(server: ComfyServer) -> None:
    server.add_input_image(OTHER_IMAGE, picture(9))


DRAWN = pytest.mark.parametrize(
    # The edit's nodes also draw in test_our_own_workflows.
    "edited",
    [name if name == "image_flux2_text_to_image" else pytest.param(name, marks=pytest.mark.thorough) for name in SIZES],
    indirect=True,
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.thorough] if name.endswith("fp8") else []) for name in SIZES],
)
def edited(request: pytest.FixtureRequest, server: ComfyServer, frontend: Frontend) -> Edited:
    name: str = request.param
    workflow = fetch_template(server, name)
    for number, node in enumerate(node for node in all_nodes(workflow) if node["type"] == "LoadImage"):
        server.add_input_image(node["widgets_values"][0], picture(number))
    write_models(server, workflow)

    show(frontend, workflow, name)
    frontend.errors.clear()
    if name == "image_flux2_text_to_image":
        for widget, size in zip(("width", "height"), SIZES[name], strict=True):
            assert set_widgets(frontend, None, widget, {"*": size}) == 1
    else:
        assert set_widgets(frontend, "ImageScaleToTotalPixels", "megapixels", {"*": MEGAPIXELS})
    assert set_widgets(frontend, "PrimitiveInt", "value", STEPS) == 2
    stock = both_ways(frontend)
    opened = frontend.graph()
    clip_name = next(node for node in stock[False].values() if node["class_type"] == "CLIPLoader")["inputs"][
        "clip_name"
    ]
    assert replace(frontend, "CLIPLoader", REFERENCE, clip_name=clip_name, config=MISTRAL_CONFIG).lost == []
    reference = both_ways(frontend)
    for node in reference[True].values():  # with the LoRA
        if node["class_type"] == "UNETLoader":
            node["inputs"]["unet_name"] = EXACT + node["inputs"]["unet_name"]

    show(frontend, opened, name)
    text_encoder = replace(frontend, "CLIPLoader", TEXT_LOADER, type="flux2")
    model = replace(frontend, "UNETLoader", LOADER)
    layout = wire(frontend, LAYOUT, "layout", devices="cpu", auto=False, ulysses=2)
    ours = both_ways(frontend)
    show(frontend, frontend.graph(), name)
    # The front end asks for the size of models that are not there, which ComfyUI's own policy forbids here.
    errors = [error for error in frontend.errors if "Content Security Policy" not in error]
    return Edited(name, stock, reference, ours, frontend.prompt(), text_encoder, model, layout, errors)


def fetch_template(server: ComfyServer, name: str) -> dict[str, Any]:
    """A template as the template browser opens it, from the package that is installed with ComfyUI."""
    try:
        return server.get(f"/templates/{name}.json")
    except urllib.error.HTTPError:
        pytest.skip(f"no template {name}: ComfyUI's Python has no comfyui-workflow-templates with it")


def picture(number: int) -> Image.Image:
    y, x = np.mgrid[: INPUT_SIZE[1], : INPUT_SIZE[0]]
    pixels = np.stack([x * (number + 1) % 256, y * 3 % 256, (x + number) * y // 64 % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def show(frontend: Frontend, workflow: dict[str, Any], name: str) -> None:
    load = "([graph, name]) => app.loadGraphData(graph, true, true, name)"
    frontend.wait_for_another(lambda: frontend.page.evaluate(load, [workflow, name]), workflow["id"])
    frontend.page.wait_for_timeout(200)  # widgets of subgraphs get their values a little later


def both_ways(frontend: Frontend) -> dict[bool, Prompt]:
    """The open workflow in API form with the switch on and (as it is left) off, without titles."""
    prompts = {}
    for on in (True, False):
        assert set_widgets(frontend, None, SWITCH, {"*": on}) == 1
        prompts[on] = frontend.prompt()
    return prompts


def draw(server: ComfyServer, prompt: Prompt) -> np.ndarray:
    result = run_well(server, prompt)
    (file,) = result.files()
    return np.asarray(server.image(**file).convert("RGB")).astype(int)


def draw_latent(server: ComfyServer, prompt: Prompt) -> Tensor:
    """What the only sampler of a graph makes, which is not decoded."""
    (sampler,) = (key for key, node in prompt.items() if node["class_type"] in ("KSampler", "SamplerCustomAdvanced"))
    drawn = ("VAEDecode", "SaveImage", "SaveImageAdvanced")
    kept = {key: node for key, node in prompt.items() if node["class_type"] not in drawn}
    save = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/template"}}
    result = run_well(server, {**kept, "latent": save}, timeout=200)
    (file,) = result.outputs["latent"]["latents"]
    return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"].float()


def same(picture: np.ndarray, other: np.ndarray) -> bool:
    difference = np.abs(picture - other)
    return bool(difference.max() <= MOST and difference.mean() < MEAN)


def linked(prompt: Prompt, moved: dict[str, list[Any]]) -> Prompt:
    """Types and inputs of a prompt, with links to some nodes moved to others, and without those nodes."""
    return {
        key: {
            "class_type": node["class_type"],
            "inputs": {
                name: moved.get(value[0], value) if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            },
        }
        for key, node in prompt.items()
        if key not in moved
    }


def types(prompt: Prompt) -> set[str]:
    return {node["class_type"] for node in prompt.values()}


@pytest.mark.parametrize("on", [False, True], ids=["turbo off", "turbo on"])
def test_nothing_else_changes(edited: Edited, on: bool):
    before, after = edited.stock[on], edited.ours[on]
    assert types(before) - types(after) == {"UNETLoader", "CLIPLoader"}
    assert types(after) - types(before) == {LOADER, TEXT_LOADER, LAYOUT}
    clip, model = edited.text_encoder, edited.model
    moved = {clip.old: [clip.new, clip.output], model.old: [model.new, model.output]}
    new = (clip.new, model.new, edited.layout)
    assert linked(before, moved) == {key: node for key, node in linked(after, {}).items() if key not in new}
    assert (clip.lost, model.lost) == ([], [])
    # The name still comes from the subgraph's own widget, as in the template.
    unet_name = before[model.old]["inputs"]["unet_name"]
    layout = [edited.layout, 0]
    assert after[model.new]["inputs"] == {"unet_name": unet_name, "weight_dtype": "default", "layout": layout}
    assert after[clip.new]["inputs"]["layout"] == layout


def test_saved_and_opened_again(edited: Edited):
    assert linked(edited.reopened, {}) == linked(edited.ours[False], {})
    assert edited.errors == []


@DRAWN
def test_the_same_picture_as_with_comfyuis_own_loaders(edited: Edited, server: ComfyServer):
    drawn = {}
    for on in (False, True):
        drawn[on] = draw(server, edited.ours[on])
        width, height = SIZES[edited.name]
        assert drawn[on].shape == (height, width, 3)
        assert drawn[on].std() > 10
        assert same(drawn[on], draw(server, edited.reference[on]))
    # The switch does something: the numbers of steps differ, and the LoRA is on.
    assert not same(drawn[False], drawn[True])
    check_lora(server, edited.ours[True], edited.reference[True])


def check_lora(server: ComfyServer, ours: Prompt, reference: Prompt) -> None:
    """Latents with the LoRA are those of ComfyUI's own classes, and others than without it."""
    latent = draw_latent(server, ours)
    assert relative_error(latent, draw_latent(server, reference)) <= PARITY
    without = copy.deepcopy(ours)
    (lora,) = (node for node in without.values() if node["class_type"] == LORA)
    assert lora["inputs"]["strength_model"] == 1
    lora["inputs"]["strength_model"] = 0.0
    assert relative_error(draw_latent(server, without), latent) > 100 * PARITY


@DRAWN
def test_what_goes_in_is_seen(edited: Edited, server: ComfyServer):
    """Proof that the comparison can fail: other words, guidance or input images make another picture."""
    usual = edited.ours[False]
    changes = [
        (key, name, value)
        for key, node in usual.items()
        for kind, name, value in (
            ("CLIPTextEncode", "text", "a cat"),
            ("FluxGuidance", "guidance", 2.0),
            ("LoadImage", "image", OTHER_IMAGE),
        )
        if node["class_type"] == kind
    ]
    drawn = draw(server, usual)
    for key, name, value in changes:
        prompt = copy.deepcopy(usual)
        prompt[key]["inputs"][name] = value
        assert not same(drawn, draw(server, prompt)), name


@pytest.mark.parametrize("name", ["06_flux2_text_to_image", "07_flux2_edit", "11_z_image_turbo", "12_flux2_klein"])
def test_our_own_workflows(server: ComfyServer, name: str):
    """The shipped flat graphs, on small files of the names that they ask for, against ComfyUI's own loaders."""
    folder = CHECKOUT / "workflows"
    write_models(server, json.loads((folder / f"{name}.json").read_text()))
    server.add_input_image("example.png", picture(3))
    ours: Prompt = json.loads((folder / "api" / f"{name}.json").read_text())
    small = {"width": 128, "height": 96, "megapixels": MEGAPIXELS, "steps": 2}
    for node in ours.values():
        if node["class_type"] == LAYOUT:  # automatic, which would be one rank on the CPU
            node["inputs"] |= {"auto": False, "ulysses": 2}
        elif node["class_type"] == "CLIPLoader":  # of a small file, on both sides
            names = {key: node["inputs"][key] for key in ("clip_name", "type")}
            node |= {"class_type": REFERENCE, "inputs": {**names, "config": QWEN3_CONFIG}}
        node["inputs"] |= {key: small[key] for key, value in node["inputs"].items()
                           if key in small and not isinstance(value, list)}  # fmt: skip
    reference = copy.deepcopy(ours)
    for node in reference.values():
        names = node["inputs"]
        if node["class_type"] == LOADER:
            file = names["unet_name"]
            stock = next((kind for start, kind in STOCK.items() if file.startswith(start)), "UNETLoader")
            node |= {"class_type": stock, "inputs": {"unet_name": file, "weight_dtype": "default"}}
        elif node["class_type"] == TEXT_LOADER:
            node |= {"class_type": REFERENCE, "inputs": {"clip_name": names["clip_name"], "config": MISTRAL_CONFIG}}
    reference = {key: node for key, node in reference.items() if node["class_type"] != LAYOUT}
    drawn = draw(server, ours)
    assert drawn.shape == (96, 128, 3) or "edit" in name
    assert drawn.std() > 10
    assert same(drawn, draw(server, reference))
    other = copy.deepcopy(ours)
    for node in other.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = "a cat"
    assert not same(drawn, draw(server, other))
