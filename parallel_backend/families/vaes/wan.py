"""Wan's VAEs, `AutoencoderKLWan`: 2.1 (16 channels, which Qwen-Image has too) and 2.2 (48), and their files.

A clip goes through in pieces: the first frame alone, then four for each further latent one, with what convolutions in
time keep of the frames before. All ranks work on a piece together, each on a band of its rows or columns.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mesh import Axis
from ...parallel.bands import Bands
from ...parallel.tensor import Model
from ..file_shapes import shape_of
from ..vae import VAE, LatentShape, OutOfStepError, VaeRun
from .causal_conv import Place, count_caches, cut_layers

MARK = "decoder.middle.0.residual.0.gamma"
"""In all of Wan's VAE files."""
MARK_22 = "decoder.upsamples.0.upsamples.0.residual.2.weight"
FRAMES = 4
"""Frames to one latent one, after the first."""

# What shapes do not tell, as of Wan 2.2's VAE; of 2.1's it is what diffusers' class has by default.
_LATENTS_22 = {
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}  # fmt: skip
_CHANNELS_22 = 48
_RESIDUAL_22 = {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}


class WanVAE(VAE):
    """Wan 2.1's (16 channels at an eighth of the size) and 2.2's (48 at a sixteenth), four frames to a latent one."""

    title = "Wan"
    class_name = "AutoencoderKLWan"
    file_title = "wan2.2_vae.safetensors or wan_2.1_vae.safetensors"
    imports = ("diffusers.models.autoencoders.autoencoder_kl_wan",)
    over_ranks = True

    def latent_shape(self, config: Mapping[str, Any]) -> LatentShape:
        channels = config.get("z_dim", 16)
        return LatentShape(channels, config.get("scale_factor_spatial", 8), FRAMES)

    def build(self, config: Mapping[str, Any]) -> Model:
        from diffusers import AutoencoderKLWan

        known = inspect.signature(AutoencoderKLWan.__init__).parameters
        with torch.device("meta"):
            return AutoencoderKLWan.from_config({key: value for key, value in config.items() if key in known})

    def load(self, folder: Path, config: Mapping[str, Any]) -> Model:
        from diffusers.models.model_loading_utils import load_state_dict

        vae = self.build(config).to_empty(device="cpu").float()
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_state_dict(file, disable_mmap=True)
        vae.load_state_dict(tensors)
        return vae.eval()

    def is_file(self, keys: Collection[str]) -> bool:
        return MARK in keys

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The configuration of `AutoencoderKLWan`; ValueError for a tensor that is missing or of another model."""
        is_22 = MARK_22 in shapes
        channels = shape_of(shapes, "conv2.weight", 5)[0]
        seen, shown = shape_of(shapes, "encoder.conv1.weight", 5)[1], shape_of(shapes, "decoder.head.2.weight", 5)[0]
        expected = 12 if is_22 else 3  # two by two pixels are one position there
        if (seen, shown) != (expected, expected):
            raise ValueError(
                f"it takes {seen} channels of a picture and gives {shown}, where {expected} are expected: a VAE with "
                "transparency (of Qwen-Image-Layered), which ComfyUI's own Load VAE loads"
            )
        if is_22 and channels != _CHANNELS_22:
            raise ValueError(f"its latents have {channels} channels, where Wan 2.2's VAE has {_CHANNELS_22}")
        return {
            "base_dim": shape_of(shapes, "encoder.conv1.weight", 5)[0],
            "decoder_base_dim": shape_of(shapes, "decoder.head.0.gamma", 4)[0],
            "z_dim": channels,
            **({"in_channels": 12, "out_channels": 12, **_RESIDUAL_22, **_LATENTS_22} if is_22 else {}),
        }

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_renamed(key, MARK_22 in tensors): tensor for key, tensor in tensors.items()}

    def width(self, config: Mapping[str, Any]) -> int:
        # On an H100, decoding took 8.3 GiB for 1024 x 1024 and 13.9 for 1328 x 1328 with 96 features: convolutions in
        # time keep padded copies of what they saw.
        base, patch = config.get("decoder_base_dim") or config.get("base_dim", 96), config.get("patch_size") or 1
        return 22 * base // patch**2

    def latent_pieces(self, frames: int) -> list[int]:
        return [1] * frames

    def image_pieces(self, frames: int) -> list[int]:
        return [1] + [FRAMES] * ((frames - 1) // FRAMES)  # as ComfyUI: what is left over makes no latent frame

    def start(self, vae: Model, config: Mapping[str, Any], decodes: bool, axis: Axis, shape: Sequence[int]) -> VaeRun:
        latent = self.latent_shape(config)
        height, width = (size // (1 if decodes else latent.downscale) for size in shape[-2:])
        bands = Bands(axis, max(height, width), -2 if height >= width else -1)
        return _Run(self, vae, config, decodes, bands)


class QwenImageVAE(WanVAE):
    """Qwen-Image's: Wan 2.1's with other weights, for single frames."""

    title = "Qwen-Image and Wan 2.1"
    class_name = "AutoencoderKLQwenImage"
    file_title = "qwen_image_vae.safetensors or wan_2.1_vae.safetensors"

    def build(self, config: Mapping[str, Any]) -> Model:
        channels = config.get("input_channels", 3)
        return super().build({**config, "in_channels": channels, "out_channels": channels})

    def is_file(self, keys: Collection[str]) -> bool:
        return super().is_file(keys) and MARK_22 not in keys


class _Run(VaeRun):
    """One clip on its way through, piece by piece; what layers keep between the pieces.

    Args:
        kind, vae, config: of the VAE.
        decodes: whether latents become frames, or frames latents.
        bands: how it is cut.
    """

    def __init__(self, kind: WanVAE, vae: Model, config: Mapping[str, Any], decodes: bool, bands: Bands) -> None:
        self.kind, self.vae, self.config, self.decodes, self.bands = kind, vae, config, decodes, bands
        self.kept: list[Any] = [None] * count_caches(vae.decoder if decodes else vae.encoder)
        self.is_first = True

    def piece(self, x: Tensor) -> Tensor:
        device = next(self.vae.parameters()).device
        self.bands.begin(device)
        kept = list(self.kept)
        try:
            done = self._forward(self.vae, self.bands.own(x).to(device, torch.float32), kept)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # and with them the memory that was taken
            self._catch_up(x)
            raise
        self.kept, self.is_first = kept, False
        return done

    def _catch_up(self, x: Tensor) -> None:
        """Do the same without memory, but for what the other ranks wait for."""
        try:
            outline = self.kind.build(self.config)
            kept = [tensor.to("meta") if isinstance(tensor, Tensor) else tensor for tensor in self.kept]
            band = self.bands.own(x).to("meta", torch.float32)
            self.bands.catch_up(lambda: self._forward(outline, band, kept))
        except Exception as error:
            raise OutOfStepError(f"it failed, and could not go on with what the others wait for: {error!r}") from error

    def _forward(self, vae: Model, x: Tensor, kept: list[Any]) -> Tensor:
        """A piece of a clip; on the meta device only what is exchanged is real."""
        if not hasattr(vae, _PLACE):
            place = Place()
            cut_layers(vae, place)
            setattr(vae, _PLACE, place)
        getattr(vae, _PLACE).bands = self.bands
        return self._decode(vae, x, kept) if self.decodes else self._encode(vae, x, kept)

    def _decode(self, vae: Model, x: Tensor, kept: list[Any]) -> Tensor:
        mean, std = _latent_statistics(vae, x)
        x = vae.post_quant_conv(x * std + mean)
        x = vae.decoder(x, feat_cache=kept, feat_idx=[0], first_chunk=self.is_first)
        # Not cut off at -1 and 1 as diffusers has it: ComfyUI blends tiles before it does that.
        return self.bands.gather(_unpatched(x, vae.config.patch_size or 1))

    def _encode(self, vae: Model, x: Tensor, kept: list[Any]) -> Tensor:
        x = vae.encoder(_patched(x, vae.config.patch_size or 1), feat_cache=kept, feat_idx=[0])
        latent = vae.quant_conv(x).chunk(2, 1)[0]
        mean, std = _latent_statistics(vae, latent)
        return self.bands.gather((latent - mean) / std)


_PLACE = "_place_of_bands"


def _patched(x: Tensor, size: int) -> Tensor:
    """``[B, C, T, H, W]`` with a square of pixels, column by column, as the channels of one position."""
    x = x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # B, C, T, h, size, w, size
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unpatched(x: Tensor, size: int) -> Tensor:
    """The way back."""
    x = x.unflatten(1, (-1, size, size))  # B, C, column, row, T, h, w
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(-2).flatten(-3, -2)


def _latent_statistics(vae: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent's channels, each ``[1, C, 1, 1, 1]``."""
    mean, std = (
        torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


_RESNETS = 3
"""Residual blocks of a level of the decoder; the encoder's have one less."""
_LAYERS = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}
_PARTS = {
    "conv1.": "quant_conv.",
    "conv2.": "post_quant_conv.",
    "encoder.conv1.": "encoder.conv_in.",
    "decoder.conv1.": "decoder.conv_in.",
    "encoder.middle.0.": "encoder.mid_block.resnets.0.",
    "encoder.middle.1.": "encoder.mid_block.attentions.0.",
    "encoder.middle.2.": "encoder.mid_block.resnets.1.",
    "decoder.middle.0.": "decoder.mid_block.resnets.0.",
    "decoder.middle.1.": "decoder.mid_block.attentions.0.",
    "decoder.middle.2.": "decoder.mid_block.resnets.1.",
    "encoder.head.0.": "encoder.norm_out.",
    "encoder.head.2.": "encoder.conv_out.",
    "decoder.head.0.": "decoder.norm_out.",
    "decoder.head.2.": "decoder.conv_out.",
}


def _renamed(key: str, is_22: bool) -> str:
    """A tensor of a file under diffusers' name; what is not known keeps its own, and is found to be too many."""
    for theirs, ours in _PARTS.items():
        if key.startswith(theirs):
            return _of_layer(ours + key.removeprefix(theirs))
    if is_22 and (match := re.match(r"(en|de)coder\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.*)", key)):
        coder, level, index, rest = match[1], match[2], int(match[3]), match[4]
        decodes = coder == "de"
        last = _RESNETS if decodes else _RESNETS - 1
        part = f"resnets.{index}" if index < last else "upsampler" if decodes else "downsampler"
        return _of_layer(f"{coder}coder.{'up' if decodes else 'down'}_blocks.{level}.{part}.{rest}")
    if not is_22 and (match := re.match(r"encoder\.downsamples\.(.*)", key)):
        return _of_layer(f"encoder.down_blocks.{match[1]}")
    if not is_22 and (match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key)):
        level, index = divmod(int(match[1]), _RESNETS + 1)
        part = f"resnets.{index}" if index < _RESNETS else "upsamplers.0"
        return _of_layer(f"decoder.up_blocks.{level}.{part}.{match[2]}")
    return key


def _of_layer(name: str) -> str:
    for theirs, ours in _LAYERS.items():
        name = name.replace(theirs, ours)
    return name
