"""ComfyUI's own Qwen-Image templates with Lightning's LoRA on, UNETLoader and CLIPLoader replaced, and nothing else.

As in test_templates, each is opened in the real front end. Models are small and random, and so is the LoRA, which has
the names that Lightning's has; stock has the same weights as a pipeline, as it would round the sum to 8 bits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..browser.edits import Replaced, replace, set_widgets, wire
from ..browser.frontend import Frontend, what_is_missing
from .server import ComfyServer
from .template_models import all_nodes
from .test_qwen_workflows import SIZE, references  # noqa: F401 (a fixture)
from .test_templates import LAYOUT, LOADER, TEXT_LOADER, Prompt, check_lora, fetch_template, linked, picture, show

TEMPLATES = {"image_qwen_image": "08_qwen_image", "image_qwen_image_edit_2511": "10_qwen_image_edit_2511"}
"""Templates -> our workflow of the same model, whose small files these are."""
RANK, ALPHA = 4, 8.0

pytestmark = [
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(400),
]


@dataclass
class Edited:
    """A template in API form with the LoRA on, as it comes and with our loaders."""

    stock: Prompt
    ours: Prompt
    text_encoder: Replaced
    model: Replaced
    layout: str


@pytest.fixture(scope="module")
def frontend(qwen: ComfyServer) -> Iterator[Frontend]:
    with Frontend(qwen) as frontend:
        yield frontend


def write_lightning(server: ComfyServer, prompt: Prompt) -> None:
    """A LoRA for every linear of the blocks, under the model's bare names, each with an alpha, in bf16."""
    names = {key: value for node in prompt.values() for key, value in node["inputs"].items() if key.endswith("_name")}
    tensors = {}
    for number, (key, weight) in enumerate(load_file(server.models / "diffusion_models" / names["unet_name"]).items()):
        if key.startswith("transformer_blocks") and weight.ndim == 2:
            base, generator = key.removesuffix(".weight"), torch.Generator().manual_seed(number)
            rows, columns = weight.shape
            tensors[f"{base}.lora_up.weight"] = (0.1 * torch.randn(rows, RANK, generator=generator)).bfloat16()
            tensors[f"{base}.lora_down.weight"] = (
                torch.randn(RANK, columns, generator=generator) / columns**0.5
            ).bfloat16()
            tensors[f"{base}.alpha"] = torch.tensor(ALPHA)
    assert len(tensors) >= 3 * 12
    folder = server.models / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / names["lora_name"])


def small(prompt: Prompt) -> Prompt:
    """With a small picture and few steps, and without reference latents of a megapixel, which take long to encode."""
    prompt = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in prompt.items()}
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "EmptySD3LatentImage":
            inputs["width"], inputs["height"] = SIZE
        elif node["class_type"] == "FluxKontextImageScale":
            node["class_type"] = "ImageScale"
            inputs |= {"upscale_method": "lanczos", "width": SIZE[0], "height": SIZE[1], "crop": "disabled"}
        elif node["class_type"] == "KSampler":
            inputs["steps"] = 2
        elif node["class_type"] == "TextEncodeQwenImageEditPlus":
            del inputs["vae"]
    return prompt


@pytest.fixture(scope="module", params=TEMPLATES)
def edited(request, qwen: ComfyServer, frontend: Frontend, references: dict[str, str]) -> tuple[str, Edited]:  # noqa: F811
    workflow = fetch_template(qwen, request.param)
    for number, node in enumerate(node for node in all_nodes(workflow) if node["type"] == "LoadImage"):
        qwen.add_input_image(node["widgets_values"][0], picture(number))
    show(frontend, workflow, request.param)
    assert set_widgets(frontend, "PrimitiveBoolean", "value", {"*": True}) == 1
    set_widgets(frontend, None, "value", {"False": True, "false": True})
    stock = frontend.prompt()
    text_encoder = replace(frontend, "CLIPLoader", TEXT_LOADER, type="qwen_image")
    model = replace(frontend, "UNETLoader", LOADER)
    layout = wire(frontend, LAYOUT, "layout", devices="cpu", auto=False, ulysses=2, tp=2)
    ours = frontend.prompt()
    write_lightning(qwen, ours)
    return references[TEMPLATES[request.param]], Edited(stock, ours, text_encoder, model, layout)


def test_nothing_else_changes(edited):
    _, one = edited
    clip, model = one.text_encoder, one.model
    assert (clip.lost, model.lost) == ([], [])
    moved = {clip.old: [clip.new, clip.output], model.old: [model.new, model.output]}
    new = (clip.new, model.new, one.layout)
    assert linked(one.stock, moved) == {key: node for key, node in linked(one.ours, {}).items() if key not in new}


def test_the_same_latents_as_with_comfyuis_own_classes(edited, qwen: ComfyServer):
    pipeline, one = edited
    moved = {one.text_encoder.old: ["reference", 1], one.model.old: ["reference", 0]}
    reference = linked(small(one.stock), moved)
    reference["reference"] = {"class_type": "ReferencePipelineLoader", "inputs": {"pipeline": pipeline}}
    check_lora(qwen, small(one.ours), reference)
