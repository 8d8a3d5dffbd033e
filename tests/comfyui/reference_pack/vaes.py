"""ComfyUI's own VAE of Wan 2.2 in any width, random latents and clips, and what becomes of them, not rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file


class ReferenceWanVAE:
    """Takes the place of Load VAE, which knows Wan 2.2's VAE in its real widths only."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae_name": ("STRING", {})}}

    def load(self, vae_name: str) -> tuple[Any]:
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae", vae_name))
        widths = {
            "dim": weights["encoder.conv1.weight"].shape[0],
            "dec_dim": weights["decoder.head.0.gamma"].shape[0],
        }
        real = comfy.ldm.wan.vae2_2.WanVAE
        comfy.ldm.wan.vae2_2.WanVAE = lambda **config: real(**{**config, **widths})
        try:
            return (comfy.sd.VAE(sd=weights),)
        finally:
            comfy.ldm.wan.vae2_2.WanVAE = real


class ReferenceClip:
    """A random latent of a shape, or pictures ``[F, H, W, 3]``."""

    RETURN_TYPES = ("LATENT", "IMAGE")
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"shape": ("STRING", {})}}

    def make(self, shape: str) -> tuple[Any, Any]:
        generator = torch.Generator().manual_seed(0)
        made = torch.randn(json.loads(shape), generator=generator)
        return {"samples": made}, made.mul(0.2).add(0.5).clamp(0, 1)


class ReferenceNoText:
    """A conditioning without any text, for nodes that add to one."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        return ([[torch.zeros(1, 1, 8), {}]],)


class ReferenceSaveTensor:
    """Writes pictures, a latent, or the latent in a conditioning, as they are."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"name": ("STRING", {})},
            "optional": {"images": ("IMAGE",), "samples": ("LATENT",), "conditioning": ("CONDITIONING",)},
        }

    def save(self, name: str, images: Any = None, samples: Any = None, conditioning: Any = None) -> dict[str, Any]:
        tensor = images
        if samples is not None:
            tensor = samples["samples"]
        elif conditioning is not None:
            tensor = conditioning[0][1]["concat_latent_image"]
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"tensor": tensor.float().contiguous()}, path)
        return {"ui": {"text": [path.name]}}
