"""Qwen-Image's VAE, `AutoencoderKLQwenImage`, which it shares with Wan 2.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...parallel.tensor import Model
from ..vae import VAE


class QwenImageVAE(VAE):
    """Frames of 16 channels at an eighth of the size; its files are ComfyUI's alone."""

    title = "Qwen-Image"
    class_name = "AutoencoderKLQwenImage"
    imports = ("diffusers.models.autoencoders.autoencoder_kl_qwenimage",)
    latent_channels = 16
    latent_dims = 5
    downscale = 8

    def width(self, config: Mapping[str, Any]) -> int:
        # On an H100, decoding took 8.3 GiB for 1024 x 1024 and 13.9 for 1328 x 1328 with 96 features: convolutions in
        # time keep padded copies of what they saw.
        return 22 * config["base_dim"] * config["dim_mult"][0]

    def decode(self, vae: Model, latent: Tensor) -> Tensor:
        mean, std = _latent_statistics(vae, latent)
        return vae.decode(latent * std + mean, return_dict=False)[0]

    def encode(self, vae: Model, image: Tensor) -> Tensor:
        latent = vae.encode(image, return_dict=False)[0].mode()
        mean, std = _latent_statistics(vae, latent)
        return (latent - mean) / std


def _latent_statistics(vae: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent's channels, each ``[1, C, 1, 1, 1]``."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like), std.to(like)
