"""Small files under the names that ComfyUI's templates and our workflows ask for, and ComfyUI's own loaders of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.quantized_file import quantize
from tests.qwen3_file import CONFIG, write_qwen3
from tests.single_file import flux2_shapes, flux2_tensors, to_fp8, write
from tests.text_encoder_file import comfy_config, write_text
from tests.vae_file import write_tiny_vae, write_vae
from tests.z_image_file import z_image_model, z_image_tensors

from .server import ComfyServer

REFERENCE = "ReferenceTextEncoder"
"""ComfyUI's loader knows text encoders of the real size only; this node hands small ones to ComfyUI's own classes."""
MISTRAL_CONFIG, QWEN3_CONFIG = json.dumps(comfy_config()), json.dumps(CONFIG)
EXACT = "exact-"
"""How names of files begin that have the weights of one in 8 bits as they are: stock rounds those anew with a LoRA."""
LORA_RANK = 4
STOCK = {"z_image": "ReferenceZImage"}
"""What stands for ComfyUI's Load Diffusion Model where that takes no small file, by how the file's name starts."""


def all_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Also those in subgraphs."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    return [node for graph in (workflow, *subgraphs) for node in graph["nodes"]]


def write_models(server: ComfyServer, workflow: dict[str, Any]) -> None:
    """The models that a template says it needs."""
    models = [model for node in all_nodes(workflow) for model in node.get("properties", {}).get("models", [])]
    writers = {
        "diffusion_models": _write_transformer,
        "text_encoders": _write_text_encoder,
        "vae": _write_vae,
        "loras": _write_lora,
    }
    for path in {server.models / model["directory"] / model["name"] for model in models}:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and path.parent.name in writers:
            writers[path.parent.name](path)


def _write_transformer(path: Path) -> None:
    if path.name.startswith("z_image"):
        tensors = {name: tensor.bfloat16() for name, tensor in z_image_tensors(z_image_model()).items()}
        if "int8_convrot" in path.name:  # of a width that 16 divides, and 256 does not
            tensors, _, _ = quantize(tensors, "int8_convrot", part="layers.", group=16)
        write(path, tensors)
        return
    tensors = flux2_tensors(guidance="klein" not in path.name)
    stored, metadata = to_fp8(tensors, "metadata") if "fp8" in path.name else (tensors, {})
    write(path, stored, metadata=metadata)
    if stored is not tensors:
        write(path.with_name(EXACT + path.name), dequantized(stored))


def dequantized(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file's weights stand for."""
    scales = {key.removesuffix("_scale"): value for key, value in stored.items() if key.endswith(".weight_scale")}
    return {
        key: tensor.float() * scales.get(key, torch.tensor(1.0))
        for key, tensor in stored.items()
        if not key.endswith(".weight_scale")
    }


def _write_lora(path: Path) -> None:
    """Random, for every linear of FLUX.2's blocks, under ComfyUI's names, as the turbo LoRA has them."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for key, shape in flux2_shapes().items():
        if "blocks." in key and len(shape) == 2:
            base, (rows, columns) = f"diffusion_model.{key.removesuffix('.weight')}", shape
            down = torch.randn(LORA_RANK, columns, generator=generator) / columns**0.5
            up = 0.1 * torch.randn(rows, LORA_RANK, generator=generator)
            tensors |= {f"{base}.lora_A.weight": down.bfloat16(), f"{base}.lora_B.weight": up.bfloat16()}
    save_file(tensors, path)


def _write_text_encoder(path: Path) -> None:
    if path.name.startswith("qwen_3"):
        write_qwen3(path)
    else:
        write_text(path, "metadata" if "fp8" in path.name else "bf16")


def _write_vae(path: Path) -> None:
    if path.name == "ae.safetensors":
        write_tiny_vae(path)
        return
    one = path.parent / "flux2-tiny.safetensors"
    if not one.exists():
        write_vae(one)
    path.symlink_to(one)
