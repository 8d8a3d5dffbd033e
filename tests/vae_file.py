"""A random FLUX.2 VAE in one file, the smallest that ComfyUI's own loader takes for one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
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
