"""ComfyUI's own Qwen-Image templates with Lightning's LoRA on, UNETLoader and CLIPLoader replaced, and nothing else.

As in test_templates, each is opened in the real front end. Models are small and random, and so is the LoRA, which has
the names that Lightning's has; stock has the same weights as a pipeline, as it would round the sum to 8 bits again.
Where inputs are rounded to 8 bits, too, stock's own model of the same file, without the LoRA, says how much that is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.errors import relative_error
from tests.quantized_file import needs_kitchen, quantize
from tests.single_file import write

from ..browser.edits import Replaced, replace, set_widgets, wire
from ..browser.frontend import Frontend, what_is_missing
from .server import ComfyServer
from .template_models import all_nodes
from .test_qwen_workflows import SIZE, references  # noqa: F401 (a fixture)
from .test_templates import (
    LAYOUT,
    LOADER,
    LORA,
    PARITY,
    TEXT_LOADER,
    Prompt,
    check_lora,
    draw_latent,
    fetch_template,
    linked,
    picture,
    show,
)

TEMPLATES = {
    "image_qwen_image": "08_qwen_image",
    "image_qwen_image_edit_2511": "10_qwen_image_edit_2511",
    "image_qwen_image_edit_2511_int8": "10_qwen_image_edit_2511",
}
"""Templates -> our workflow of the same model, whose small files these are."""
INT8 = "qwen_image_edit_2511_int8_convrot.safetensors"
RANK, ALPHA = 4, 8.0

pytestmark = [
    needs_kitchen,
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


def write_lightning(server: ComfyServer, prompt: Prompt) -> None:
    """A LoRA for every linear of the blocks, under the model's bare names, each with an alpha, in bf16."""
    names = {key: value for node in prompt.values() for key, value in node["inputs"].items() if key.endswith("_name")}
    tensors = {}
    for number, (key, weight) in enumerate(load_file(server.models / "diffusion_models" / names["unet_name"]).items()):
        if key.startswith("transformer_blocks") and key.endswith(".weight") and weight.ndim == 2:
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


@pytest.fixture(scope="module")
def pipelines(qwen: ComfyServer, home: Path, references: dict[str, str]) -> dict[str, str]:  # noqa: F811
    """Template -> the weights of its files as a pipeline; the file in int8 is written, in groups of 256 as its own."""
    found = {name: references[workflow] for name, workflow in TEMPLATES.items()}
    (int8,) = (name for name in TEMPLATES if name.endswith("_int8"))
    like, made = home / "models" / found[int8], home / "models" / "int8-reference"
    shutil.copytree(like, made, dirs_exist_ok=True)
    weights = made / "transformer" / "diffusion_pytorch_model.safetensors"
    stored, metadata, meant = quantize(load_file(weights), "int8_convrot", part="transformer_blocks")
    save_file(meant, weights)
    stored["__index_timestep_zero__"] = torch.empty(0)
    write(qwen.models / "diffusion_models" / INT8, stored, metadata=metadata)
    return {**found, int8: made.name}


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


# Those in fp8 are the one in int8 but for their files; test_qwen_workflows draws ours of them.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name.endswith("_int8") else [pytest.mark.thorough]) for name in TEMPLATES],
)
def edited(request, qwen: ComfyServer, frontend: Frontend, pipelines: dict[str, str]) -> tuple[str, Edited]:
    workflow = fetch_template(qwen, request.param)
    for number, node in enumerate(node for node in all_nodes(workflow) if node["type"] == "LoadImage"):
        qwen.add_input_image(node["widgets_values"][0], picture(number))
    show(frontend, workflow, request.param)
    assert set_widgets(frontend, "PrimitiveBoolean", "value", {"*": True}) == 1
    set_widgets(frontend, None, "value", {"False": True, "false": True})
    stock = frontend.prompt()
    text_encoder = replace(frontend, "CLIPLoader", TEXT_LOADER, type="qwen_image")
    model = replace(frontend, "UNETLoader", LOADER)
    layout = wire(frontend, LAYOUT, "layout", devices="cpu", auto=False, ulysses=2)
    ours = frontend.prompt()
    write_lightning(qwen, ours)
    return pipelines[request.param], Edited(stock, ours, text_encoder, model, layout)


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
    ours = small(one.ours)
    if INT8 not in json.dumps(ours):
        check_lora(qwen, ours, reference)
        return
    stock = linked(small(one.stock), {one.text_encoder.old: ["reference", 1]})
    assert stock[one.model.old]["inputs"]["unet_name"] == INT8
    stock[one.model.old]["class_type"] = "ReferenceQwenImage"
    stock["reference"] = reference["reference"]
    exact = draw_latent(qwen, without_lora(reference))
    rounding = relative_error(draw_latent(qwen, without_lora(stock)), exact)
    assert rounding > 10 * PARITY
    # Inputs are rounded to few bits, so what differs in the last bits of fp32 ends in other roundings.
    plain, adapted = draw_latent(qwen, without_lora(ours)), draw_latent(qwen, ours)
    assert rounding / 2 <= relative_error(plain, exact) <= 1.3 * rounding
    assert relative_error(adapted, draw_latent(qwen, reference)) <= 1.5 * rounding
    assert relative_error(adapted, plain) > 10 * rounding


def without_lora(prompt: Prompt) -> Prompt:
    prompt = {key: {**node, "inputs": dict(node["inputs"])} for key, node in prompt.items()}
    (lora,) = (node for node in prompt.values() if node["class_type"] == LORA)
    lora["inputs"]["strength_model"] = 0.0
    return prompt
