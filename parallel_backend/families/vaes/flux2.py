"""FLUX.2's VAE in one file, under diffusers' names or Black Forest Labs': recognising it, its widths, its names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

MARK = "bn.running_mean"
"""Statistics of the latent, which no other family's VAE has."""
LEVELS = 4
_RENAMED = re.compile(r"^(?:encoder|decoder)\.((?:post_)?quant_conv\..*)$")


def is_vae_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of FLUX.2's VAE."""
    return MARK in keys and "encoder.conv_in.weight" in keys and "decoder.conv_in.weight" in keys


def vae_config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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


def vae_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of `AutoencoderKLFlux2`."""
    if "decoder.conv_norm_out.weight" in tensors:
        return dict(tensors)
    plain = {_RENAMED.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint  # which takes seconds to import

    blocks = {"down_block_types": (None,) * LEVELS, "up_block_types": (None,) * LEVELS}
    statistics = {name: tensor for name, tensor in plain.items() if name.startswith("bn.")}
    return {**convert_ldm_vae_checkpoint(plain, blocks), **statistics}
