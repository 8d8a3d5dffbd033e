"""Text and vision encoders and VAEs of random numbers, and what nodes with them put into a conditioning."""

from __future__ import annotations

import json
import zlib
from types import SimpleNamespace
from typing import Any

import node_helpers
import torch


class ReferenceText:
    """A conditioning of random numbers, others for another text: a token a word."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {}), "features": ("INT", {})}}

    def encode(self, text: str, features: int) -> tuple[Any]:
        return (_Clip(features).encode_from_tokens_scheduled(text),)


class _Clip:
    """What CLIPTextEncode asks of a CLIP."""

    def __init__(self, features: int) -> None:
        self.features = features

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list[Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        return [[torch.randn(1, len(text.split()) + 1, self.features, generator=generator), {}]]


class ReferenceRandomClip:
    """Takes the place of Load CLIP in a graph: a token a word, whose features are random."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"features": ("INT", {})}}

    def load(self, features: int) -> tuple[Any]:
        return (_Clip(features),)


class _Vision:
    """What CLIPVisionEncode asks of a vision encoder."""

    def __init__(self, tokens: int, features: int) -> None:
        self.tokens, self.features = tokens, features

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(image.mean(dim=(0, 1, 2)).numpy().tobytes()))
        states = torch.randn(len(image), self.tokens, self.features, generator=generator)
        return SimpleNamespace(penultimate_hidden_states=states)


class ReferenceVision:
    """Takes the place of Load CLIP Vision; the tokens of an image are random."""

    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"tokens": ("INT", {}), "features": ("INT", {})}}

    def load(self, tokens: int, features: int) -> tuple[Any]:
        return (_Vision(tokens, features),)


class _Vae:
    """What nodes for videos ask of a VAE: pictures become smaller, and colours other colours."""

    def __init__(self, latent_channels: int, downscale: int) -> None:
        self.latent_channels, self.downscale = latent_channels, downscale
        self.colours = torch.randn(3, latent_channels, generator=torch.Generator().manual_seed(6))

    def spacial_compression_encode(self) -> int:
        return self.downscale

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        video = (2 * pixels[..., :3] - 1).float() @ self.colours  # [F, H, W, C]
        frames, height, width, _ = video.shape
        size = ((frames - 1) // 4 + 1, height // self.downscale, width // self.downscale)
        return torch.nn.functional.interpolate(video.movedim(-1, 0)[None], size, mode="trilinear")

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        frames, height, width = latent.shape[2:]
        size = (4 * frames - 3, height * self.downscale, width * self.downscale)
        grey = torch.nn.functional.interpolate(latent[:, :3], size, mode="trilinear")
        return grey.sigmoid().movedim(1, -1)


class ReferenceVideoVae:
    """Takes the place of Load VAE."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"channels": ("INT", {}), "downscale": ("INT", {})}}

    def load(self, channels: int, downscale: int) -> tuple[Any]:
        return (_Vae(channels, downscale),)


class ReferenceConditioning:
    """Sets values of a conditioning: ``values`` has for each name a shape, and whether it is one of a list."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "change"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"conditioning": ("CONDITIONING",), "values": ("STRING", {}), "seed": ("INT", {"default": 0})}
        }

    def change(self, conditioning: Any, values: str, seed: int) -> tuple[Any]:
        generator, found = torch.Generator().manual_seed(seed), {}
        for name, shape in json.loads(values).items():
            made = torch.randn(shape, generator=generator)
            if name == "concat_mask":
                made = (made > 0).float()
            if name == "clip_vision_output":
                made = SimpleNamespace(penultimate_hidden_states=made)
            found[name] = [made] if name in ("reference_latents", "context_latents") else made
        return (node_helpers.conditioning_set_values(conditioning, found),)


class ReferenceVideoLatent:
    """A random latent of a shape, of which the first frames are given, as Wan22ImageToVideoLatent has them."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"shape": ("STRING", {}), "given": ("INT", {}), "soft": ("FLOAT", {"default": 0.0})}}

    def make(self, shape: str, given: int, soft: float = 0.0) -> tuple[Any]:
        batch, channels, frames, height, width = json.loads(shape)
        samples = torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(5))
        mask = torch.ones(batch, 1, frames, height, width)
        mask[:, :, :given] = soft
        return ({"samples": samples, "noise_mask": mask},)
