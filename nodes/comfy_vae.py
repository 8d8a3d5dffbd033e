"""The VAE: ComfyUI's VAE object, tiling and all, around a model that runs on the first worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from ..parallel_backend.loading.checkpoint import Checkpoint
from ..parallel_backend.loading.pipeline_folder import PipelineFolder
from ..parallel_backend.runtime.errors import OutOfMemoryError
from .comfy_patcher import RemotePart, RemotePatcher
from .families import VaeLook, family_of
from .group import ModelHandle, check_interrupted

HOST_MEMORY = 16 * 2**20
"""Bytes that an image takes in ComfyUI's own process while it is decoded in the worker."""


@contextlib.contextmanager
def _comfyuis_out_of_memory() -> Iterator[None]:
    """Where the worker ran out of memory and is as good as before: the error on which ComfyUI goes on with tiles."""
    try:
        yield
    except OutOfMemoryError as error:
        if not error.usable:
            raise
        raise comfy.model_management.OOM_EXCEPTION(str(error)) from error


def look_of(source: Checkpoint) -> VaeLook:
    """What ComfyUI has to know of a checkpoint's VAE; ValueError where its family brings none."""
    source.family.needs_vae()
    look = family_of(source).vae
    assert look is not None
    return look


class RemoteAutoencoder(nn.Module):
    """Stands where ComfyUI's first stage model stands, without parameters. One image travels at a time.

    Args:
        handle: of the model in the workers.
        source: its checkpoint.
    """

    def __init__(self, handle: ModelHandle, source: PipelineFolder) -> None:
        super().__init__()
        self.handle, self.family = handle, source.family
        self.latent_format = look_of(source).latent_format
        self.remote_part = RemotePart(handle, "vae")

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, 3, H, W]`` in -1..1; with frames ``[B, C, F, h, w]`` -> ``[B, 3, F', H, W]``."""
        self.family.needs_vae().check_latent(latent.shape)  # before any worker is started
        model = self.handle.get()
        if self.latent_format is not None:
            latent = self.latent_format.process_in(latent)
        with _comfyuis_out_of_memory():
            return torch.cat([model.decode(one, check_interrupted) for one in latent.split(1)]).to(latent.device)

    def encode(self, image: Tensor) -> Tensor:
        """The way back."""
        model = self.handle.get()
        with _comfyuis_out_of_memory():
            latent = torch.cat([model.encode(one, check_interrupted) for one in image.split(1)]).to(image.device)
        return latent if self.latent_format is None else self.latent_format.process_out(latent)


class RemoteVAE(comfy.sd.VAE):
    """A VAE whose weights are in the workers: what `comfy.sd.VAE` finds out from weights is stated here."""

    def __init__(self, handle: ModelHandle, source: PipelineFolder) -> None:
        # Not super().__init__(), which needs the weights.
        look = look_of(source)
        self.first_stage_model = RemoteAutoencoder(handle, source)
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: HOST_MEMORY * shape[0]
        self.downscale_ratio, self.upscale_ratio = look.downscale_ratio, look.upscale_ratio
        self.latent_channels = source.family.needs_vae().latent_channels
        self.latent_dim = look.latent_dim
        self.output_channels = 3
        self.pad_channel_value = look.pad_channel_value
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes = [torch.float32]
        self.disable_offload = False
        self.not_video = False
        self.size = 1
        self.downscale_index_formula = look.downscale_index_formula
        self.upscale_index_formula = look.upscale_index_formula
        self.extra_1d_channel = None
        self.crop_input = True
        self.handles_tiling = False
        self.format_encoded = None
        self.audio_sample_rate = 44100
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = torch.float32
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = RemotePatcher(self.first_stage_model, self.device, comfy.model_management.vae_offload_device())


def make_vae(handle: ModelHandle, source: PipelineFolder) -> RemoteVAE:
    """The VAE of a pipeline whose autoencoder is on the first worker."""
    return RemoteVAE(handle, source)
