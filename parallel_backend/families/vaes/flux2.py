"""FLUX.2's VAE, `AutoencoderKLFlux2`, and its file under diffusers' names or Black Forest Labs'."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...parallel.tensor import Model
from ..vae import VAE, LatentShape

MARK = "bn.running_mean"
"""Statistics of the latent, which no other family's VAE has."""
LEVELS = 4
_RENAMED = re.compile(r"^(?:encoder|decoder)\.((?:post_)?quant_conv\..*)$")


class Flux2VAE(VAE):
    """FLUX.2's: 128 channels at a sixteenth of the size, in files of diffusers and of ComfyUI."""

    title = "FLUX.2"
    class_name = "AutoencoderKLFlux2"
    file_title = "flux2-vae.safetensors or full_encoder_small_decoder.safetensors"
    imports = ("diffusers.models.autoencoders.autoencoder_kl_flux2", "diffusers.pipelines.flux2.pipeline_flux2")

    def latent_shape(self, config: Mapping[str, Any]) -> LatentShape:
        return LatentShape(channels=128, downscale=16)

    def is_file(self, keys: Collection[str]) -> bool:
        return _is_file(keys)

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return _config_of(shapes)

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _renamed(tensors)

    def width(self, config: Mapping[str, Any]) -> int:
        # Five tensors of the widest full-size layer: a residual block's input, its norm, the activation of that and
        # what cuDNN's convolutions need beside them. On an H200, 1024 x 1024 took 4.4 to 4.9 GiB.
        return 5 * config["block_out_channels"][1]

    def decode(self, vae: Model, latent: Tensor) -> Tensor:
        from diffusers import Flux2Pipeline

        mean, std = _latent_statistics(vae, latent)
        return vae.decode(Flux2Pipeline._unpatchify_latents(latent * std + mean), return_dict=False)[0]

    def encode(self, vae: Model, image: Tensor) -> Tensor:
        from diffusers import Flux2Pipeline

        latent = Flux2Pipeline._patchify_latents(vae.encode(image, return_dict=False)[0].mode())
        mean, std = _latent_statistics(vae, latent)
        return (latent - mean) / std


def _is_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of FLUX.2's VAE."""
    return MARK in keys and "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys


def _config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What of `AutoencoderKLFlux2`'s configuration is not its default: the widths of encoder and decoder.

    Raises:
        ValueError: a tensor that says it is missing.
    """

    def width(*names: str) -> int:
        for name in names:
            if name in shapes:
                return shapes[name][0]
        raise ValueError(f"there is no tensor {names[0]}; the file is incomplete")

    encoder = [
        width(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", f"encoder.down.{i}.block.0.conv1.weight")
        for i in range(LEVELS)
    ]
    # diffusers counts the decoder's levels from the widest.
    decoder = [
        width(f"decoder.up_blocks.{LEVELS - 1 - i}.resnets.0.conv1.weight", f"decoder.up.{i}.block.0.conv1.weight")
        for i in range(LEVELS)
    ]
    return {"block_out_channels": encoder, "decoder_block_out_channels": decoder}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of `AutoencoderKLFlux2`."""
    if "decoder.conv_norm_out.weight" in tensors:
        return dict(tensors)
    plain = {_RENAMED.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint  # which takes seconds to import

    blocks = {"down_block_types": (None,) * LEVELS, "up_block_types": (None,) * LEVELS}
    statistics = {name: tensor for name, tensor in plain.items() if name.startswith("bn.")}
    return {**convert_ldm_vae_checkpoint(plain, blocks), **statistics}


def _latent_statistics(vae: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent's channels, kept in the VAE's batch norm, each ``[1, C, 1, 1]``."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(like)
    return mean, std
