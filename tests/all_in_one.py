"""Checkpoints with transformer, text encoder and VAE in one file, under the keys that ComfyUI writes them by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .single_file import flux2_tensors, to_fp8, write
from .text_encoder_file import text_tensors, text_to_fp8
from .vae_file import write_vae

MODEL, TEXT, VAE = "model.diffusion_model.", "text_encoders.mistral3_24b.transformer.", "vae."
KINDS = ("fp32", "metadata", "comfy_quant", "scaled_fp8")
"""How weights may be stored: the last three are fp8 in ComfyUI's layouts."""


def write_flux2(path: Path, kind: str = "fp32", more: Mapping[str, Tensor] | None = None) -> Path:
    """A small random FLUX.2 of one of `KINDS`, with ``more`` tensors beside it."""
    model, text = flux2_tensors(heads=4), text_tensors()
    tokenizer = text.pop("tekken_model")
    metadata: dict[str, str] = {}
    if kind != "fp32":
        (model, first), (text, second) = to_fp8(model, kind), text_to_fp8(text, kind)
        if kind == "metadata":
            layers = {
                prefix + layer: says
                for prefix, part in ((MODEL, first), (TEXT, second))
                for layer, says in json.loads(part["_quantization_metadata"])["layers"].items()
            }
            metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    tensors = {MODEL + key: tensor for key, tensor in model.items()}
    tensors |= {TEXT + key: tensor for key, tensor in text.items()}
    tensors |= {"text_encoders.tekken_model": tokenizer, "text_encoders.mistral3_24b.logit_scale": torch.tensor(4.6)}
    vae = write_vae(path.with_suffix(".vae"))
    tensors |= {VAE + key: tensor for key, tensor in load_file(vae).items()}
    vae.unlink()
    return write(path, {**tensors, **(more or {})}, metadata=metadata)
