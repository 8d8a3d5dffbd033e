"""Random VAEs in one file, the smallest that ComfyUI's own loader takes for FLUX.2's, and for one of 16 channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, AutoencoderTiny
from safetensors.torch import save_file


def write_vae(path: Path) -> Path:
    """Write the file, 72 MB in bf16.

    ComfyUI works out the decoder's width from the file, so it may be small, as in full_encoder_small_decoder. It takes
    every encoder to have the full width, and without the encoder's weights it would encode with unset memory.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLFlux2(decoder_block_out_channels=(32, 64, 128, 128))
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in vae.state_dict().items()}, path)
    return path


def write_tiny_vae(path: Path) -> Path:
    """Write a random VAE of FLUX.1's 16 channels, which Z-Image has too: a TAESD, as ComfyUI's Load VAE takes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny(latent_channels=16).eval()
        latent = torch.randn(1, 16, 12, 12)
        with torch.no_grad():
            last = vae.decoder.layers[-1]
            last.weight.mul_(0.5 / vae.decode(latent).sample.std())
            last.bias.fill_(0.5)
    tensors = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, tensor in vae.state_dict().items():
        part, _, index, rest = name.split(".", 3)
        # ComfyUI counts the clamp in front of the decoder as its first layer.
        tensors[f"taesd_{part}.{int(index) + (part == 'decoder')}.{rest}"] = tensor.contiguous()
    save_file(tensors, path)
    return path
