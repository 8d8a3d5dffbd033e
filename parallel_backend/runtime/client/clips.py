"""What a VAE gets of a picture or clip at a time, and what it does not take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...families import VAE
from ...loading.checkpoint import Checkpoint
from ...loading.pipeline_folder import PipelineFolder
from ...loading.vae_file import VaeFile

OnPiece = Callable[[int, int], None]
"""Told how many pieces of a clip are done, and of how many."""


def latent_pieces(source: Checkpoint, latent: Tensor) -> list[Tensor]:
    """A latent as the VAE of a checkpoint decodes it, piece by piece; ValueError where it is not of its kind."""
    vae, config = _vae_of(source)
    vae.check_latent(config, latent.shape)
    if not vae.latent_shape(config).frames:
        return [latent]
    return _pieces(latent, vae.latent_pieces(latent.shape[2]))


def image_pieces(source: Checkpoint, image: Tensor) -> list[Tensor]:
    """An image ``[B, 3, H, W]`` or clip ``[B, 3, F, H, W]`` as the VAE of a checkpoint encodes it, piece by piece.

    Raises:
        ValueError: it is neither, or has a size that the VAE does not take.
    """
    vae, config = _vae_of(source)
    shape = vae.latent_shape(config)
    multiple, dims = shape.downscale, (4, 5) if shape.frames else (4,)
    wrong_size = not image.numel() or any(length % multiple for length in image.shape[-2:])
    if image.ndim not in dims or image.shape[1] != 3 or wrong_size:
        frames = " or [B, 3, F, H, W]" if shape.frames else ""
        raise ValueError(
            f"the image has shape {list(image.shape)}; the VAE of {vae.title} encodes images of 3 channels, "
            f"[B, 3, H, W]{frames}, whose height and width are multiples of {multiple} pixels, {multiple} at least"
        )
    if not shape.frames:
        return [image]
    clip = image if image.ndim == 5 else image.unsqueeze(2)
    return _pieces(clip, vae.image_pieces(clip.shape[2]))


def _vae_of(source: Checkpoint) -> tuple[VAE, Mapping[str, Any]]:
    vae = source.family.needs_vae()
    if not isinstance(source, PipelineFolder | VaeFile):
        raise ValueError(f"{source.path} has no VAE")
    return vae, source.vae_config


def _pieces(clip: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The first frames of a clip, so many at a time."""
    return list(clip[:, :, : sum(sizes)].split(list(sizes), dim=2))
