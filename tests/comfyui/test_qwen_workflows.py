"""The shipped Qwen-Image workflows give the pictures that ComfyUI's own classes give on the same graph."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.save_workflows import models_of

from ..single_file import to_fp8, write
from .qwen_models import PIPELINE, ZERO, random_vae
from .server import CHECKOUT, ComfyServer
from .test_templates import Prompt, draw, linked, picture, same

OURS = {"HybridDiT_LoadDiffusionModel": 0, "HybridDiT_LoadCLIP": 1}
"""Our loaders -> which output of the reference pack's loader is the same."""
LAYOUT = "HybridDiT_ParallelLayout"
SIZE = (128, 96)
UNIFORM = 5.0
"""A picture with a smaller standard deviation than this, of 255, shows nothing."""
NAMES = ("08_qwen_image", "09_qwen_image_2512", "10_qwen_image_edit_2511")
EDITS = NAMES[2:]

pytestmark = pytest.mark.timeout(300)


def shipped(name: str) -> Prompt:
    return json.loads((CHECKOUT / "workflows" / "api" / f"{name}.json").read_text())


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file's weights stand for."""
    out = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias"):
            scale = tensors.get(f"{layer}.weight_scale", tensors.get(f"{layer}.scale_weight", torch.tensor(1.0)))
            out[name] = tensor.float() * (scale if leaf == "weight" else 1.0)
    return out


@pytest.fixture(scope="module")
def references(qwen: ComfyServer, home: Path) -> dict[str, str]:
    """The files that the workflows name, in the formats that their names tell; workflow -> the same as a pipeline."""
    models, pipelines = home / "models", {}
    text = load_file(qwen.models / "text_encoders" / "qwen.safetensors")
    scaled, _ = to_fp8(text, "scaled_fp8", part="_proj")
    qwen.add_input_image("example.png", picture(0))
    for name in NAMES:
        like, zero = (PIPELINE, "qwen"), (ZERO, "qwen_zero")
        folder, file = zero if name in EDITS else like
        transformer = load_file(qwen.models / "diffusion_models" / f"{file}.safetensors")
        if name in EDITS:  # one block, for three pictures of a megapixel each
            transformer = {key: tensor for key, tensor in transformer.items() if not re.search(r"blocks\.[1-9]", key)}
        if "fp8mixed" in json.dumps(shipped(name)):
            stored, metadata = to_fp8(transformer, "metadata")
        else:
            stored, metadata = {}, {}
            for key, tensor in transformer.items():
                stored[key] = tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 and "blocks" in key else tensor
        for model in (model for node in shipped(name).values() for model in models_of(node)):
            path = qwen.models / model["directory"] / model["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if model["directory"] == "diffusion_models":
                write(path, stored, metadata=metadata)
            elif model["directory"] == "text_encoders":
                write(path, scaled)
            else:
                write(path, vae_tensors())
        pipelines[name] = f"{name}-reference"
        made = models / pipelines[name]
        shutil.copytree(models / folder, made, dirs_exist_ok=True)  # other modules may have made them
        save_file(dequantized(stored), made / "transformer" / "diffusion_pytorch_model.safetensors")
        config = made / "transformer" / "config.json"
        blocks = len({key.split(".")[1] for key in transformer if key.startswith("transformer_blocks")})
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": blocks}))
        weights = {
            f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1): tensor
            for key, tensor in dequantized(scaled).items()
        }
        save_file(weights, made / "text_encoder" / "model.safetensors")
    return pipelines


def vae_tensors() -> dict[str, Tensor]:
    """A VAE so small that a megapixel, to which the edit nodes scale every picture, is soon encoded."""
    file = Path(__file__).parent / "reference_pack" / "wan_names.py"
    spec = importlib.util.spec_from_file_location("wan_names", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vae: AutoencoderKLQwenImage = random_vae(base_dim=4)
    weights = vae.state_dict()
    names = module.to_wan_names(weights)
    return {names[name]: tensor for name, tensor in weights.items()}


def small(name: str, references: bool) -> Prompt:
    """The shipped prompt with fewer steps and a small picture, and with or without reference latents.

    ComfyUI's node scales references to a megapixel for them, which takes long to encode.
    """
    prompt = shipped(name)
    for node in prompt.values():
        if node["class_type"] == LAYOUT:  # automatic, which would be one rank on the CPU
            node["inputs"] |= {"auto": False, "ulysses": 2}
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"]["width"], node["inputs"]["height"] = SIZE
        if node["class_type"] == "FluxKontextImageScale":  # which makes it a million pixels
            node["class_type"] = "ImageScale"
            node["inputs"] |= {"upscale_method": "lanczos", "width": SIZE[0], "height": SIZE[1], "crop": "disabled"}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1 if name in EDITS else 2
            if name in EDITS:
                node["inputs"]["cfg"] = 1.0  # one evaluation, of the positive prompt
        if node["class_type"] == "TextEncodeQwenImageEditPlus" and not (
            references and node["inputs"]["prompt"]  # of the other, the same would be encoded again
        ):
            del node["inputs"]["vae"]
    return prompt


def with_reference(prompt: Prompt, pipeline: str) -> Prompt:
    """The same graph on the reference pack's loader."""
    ours = {key: OURS[node["class_type"]] for key, node in prompt.items() if node["class_type"] in OURS}
    moved: dict[str, list[Any]] = {key: ["reference", output] for key, output in ours.items()}
    graph = linked({key: node for key, node in prompt.items() if node["class_type"] != LAYOUT}, moved)
    return {**graph, "reference": {"class_type": "ReferencePipelineLoader", "inputs": {"pipeline": pipeline}}}


@pytest.mark.parametrize(
    ("name", "latents"),
    [
        *(pytest.param(name, False, marks=[pytest.mark.thorough] * (name == NAMES[1])) for name in NAMES),
        *(pytest.param(name, True, marks=pytest.mark.thorough) for name in EDITS),
    ],
)
def test_the_same_picture_as_with_comfyuis_own_classes(
    name: str, latents: bool, qwen: ComfyServer, references: dict[str, str]
):
    prompt = small(name, latents)
    drawn = draw(qwen, prompt)
    assert drawn.std() > UNIFORM
    assert drawn.shape == (SIZE[1], SIZE[0], 3)
    assert same(drawn, draw(qwen, with_reference(prompt, references[name])))
    if name in EDITS:
        return
    # Proof that the comparison can fail: other words make another picture.
    other = copy.deepcopy(prompt)
    for node in other.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = "a cat"
    assert not same(drawn, draw(qwen, other))
