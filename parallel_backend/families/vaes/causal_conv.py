"""The layers of a causal video VAE (Wan's) on a rank that has a band of each frame; replaced on the instance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...parallel.bands import Bands
from ...parallel.tensor import Model


class Place:
    """Where the layers of one VAE find how the picture is cut that they are at work on."""

    def __init__(self) -> None:
        self.bands = Bands()


def cut_layers(vae: Model, place: Place) -> None:
    """Have the layers of an `AutoencoderKLWan` that look beyond a position take what they see there from its bands.

    These are convolutions, and the attention in the middle, where each position of a frame sees all of them. Norms are
    those of one position each.
    """
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    for module in vae.modules():
        if isinstance(module, wan.WanCausalConv3d):
            module.forward = _bound(_causal_conv, place, module)
        elif isinstance(module, wan.WanAttentionBlock):
            module.forward = _bound(_attend, place, module)
        elif isinstance(module, wan.WanResample) and module.mode.startswith("upsample"):
            convolution = module.resample[1]
            convolution.forward = _bound(_conv, place, convolution)
        elif isinstance(module, wan.WanResample) and module.mode.startswith("downsample"):
            module.resample[0] = _PadBelow(place)


def count_caches(part: nn.Module) -> int:
    """How many of its layers keep frames for the next ones, as encoder and decoder number them."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in part.modules())


def _bound(forward: Callable[..., Tensor], place: Place, module: nn.Module) -> Any:
    return functools.partial(forward, place, module)


def _causal_conv(place: Place, conv: Model, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """A convolution over the frames before (those kept, and zeros before the first) and the rows around."""
    columns, _, rows, _, frames, _ = conv._padding
    clip = [x]
    if frames and cache_x is not None:
        clip, frames = [cache_x, x], frames - cache_x.shape[2]
    if frames > 0:
        clip = [x.new_zeros(()).expand(*x.shape[:2], frames, *x.shape[3:]), *clip]
    padded, padding = place.bands.padded(clip, rows, columns)
    return F.conv3d(padded, conv.weight, conv.bias, conv.stride, (0, *padding))


def _conv(place: Place, conv: Model, x: Tensor) -> Tensor:
    """A convolution of single frames ``[B, C, H, W]``."""
    padded, padding = place.bands.padded([x], *conv.padding)
    return F.conv2d(padded, conv.weight, conv.bias, conv.stride, padding)


class _PadBelow(nn.Module):
    """Stands where frames ``[B, C, H, W]`` get a row and a column of zeros before they are halved."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        bands = self.place.bands
        if not bands.is_split:
            return F.pad(x, (0, 1, 0, 1))
        return F.pad(bands.halo([x], 0, 1), (0, 1) if bands.dim == -2 else (0, 0, 0, 1))


def _attend(place: Place, block: Model, x: Tensor) -> Tensor:
    """Attention of this band's positions over all positions of their frame, ``[B, C, T, H, W]``."""
    frames = block.norm(x.transpose(1, 2).flatten(0, 1))
    q, kv = block.to_qkv(frames).split([block.dim, 2 * block.dim], 1)
    k, v = place.bands.gather(kv).chunk(2, 1)
    q, k, v = (y.flatten(2).transpose(1, 2).unsqueeze(1) for y in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    y = block.proj(y.squeeze(1).transpose(1, 2).reshape(frames.shape))
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) + x
