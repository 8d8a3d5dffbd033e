"""The VAE: ComfyUI's VAE object, tiling and all, around a model that runs in the workers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.ldm.models.autoencoder
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..parallel_backend.loading.pipeline_folder import PipelineFolder
from ..parallel_backend.loading.safetensors_reader import read_header
from ..parallel_backend.loading.vae_file import VaeFile
from ..parallel_backend.runtime.client.remote_model import RemoteModel
from ..parallel_backend.runtime.errors import OutOfMemoryError
from .comfy_patcher import RemotePart, RemotePatcher, meta_state_dict
from .group import ModelHandle, check_interrupted
from .remote_modules import RemoteStandIn, add_modules

VaeSource: TypeAlias = PipelineFolder | VaeFile
HOST_MEMORY = 16 * 2**20
"""Bytes that an image takes on ComfyUI's own device while it is decoded in the workers."""
FORMATS: dict[int, Any] = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}
"""Channels of a VAE with frames -> what ComfyUI's latents are converted with before the workers get them, and back."""
CLASSES: dict[int, Any] = {16: comfy.ldm.wan.vae.WanVAE, 48: comfy.ldm.wan.vae2_2.WanVAE}
"""Channels of a VAE with frames -> what ComfyUI's own is."""


@contextlib.contextmanager
def _comfyuis_out_of_memory() -> Iterator[None]:
    """Where the worker ran out of memory and is as good as before: the error on which ComfyUI goes on with tiles."""
    try:
        yield
    except OutOfMemoryError as error:
        if not error.usable:
            raise
        raise comfy.model_management.OOM_EXCEPTION(str(error)) from error


class RemoteAutoencoder(RemoteStandIn):
    """Stands where ComfyUI's first stage model stands, without weights. One image or clip travels at a time.

    Args:
        handle: of the model in the workers.
        source: its checkpoint.
    """

    label = "the VAE"

    def __init__(self, handle: ModelHandle, source: VaeSource) -> None:
        super().__init__()
        self.handle, self.kind, self.vae_config = handle, source.family.needs_vae(), source.vae_config
        shape = self.kind.latent_shape(self.vae_config)
        self.latent_format = FORMATS[shape.channels]() if shape.frames else None
        self.remote_part = RemotePart(handle, "vae")
        self._source, self._shapes = source, vae_shapes(source)
        add_modules(self, self._shapes, torch.float32)
        if shape.frames:
            self.stands_for = CLASSES[shape.channels]
        else:
            engine, kl = comfy.ldm.models.autoencoder.AutoencodingEngine, comfy.ldm.models.autoencoder.AutoencoderKL
            self.stands_for = kl if "post_quant_conv.weight" in self._shapes else engine

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return meta_state_dict(self._shapes, destination, prefix)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteAutoencoder:
        return RemoteAutoencoder(self.handle, self._source)

    def decode(self, latent: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, 3, H, W]`` in -1..1; with frames ``[B, C, F, h, w]`` -> ``[B, 3, F', H, W]``.

        On the CPU, where ComfyUI keeps it: clips are large.
        """
        self.kind.check_latent(self.vae_config, latent.shape)  # before any worker is started
        if self.latent_format is not None:
            latent = self.latent_format.process_in(latent)
        return self._each(latent, lambda model, one, told: model.decode(one, check_interrupted, told))

    def encode(self, image: Tensor) -> Tensor:
        """The way back."""
        latent = self._each(image, lambda model, one, told: model.encode(one, check_interrupted, told))
        return latent if self.latent_format is None else self.latent_format.process_out(latent)

    def _each(self, batch: Tensor, work: Callable[[RemoteModel, Tensor, Callable[[int, int], None]], Tensor]) -> Tensor:
        """All of a batch, one after the other, with a progress bar where one is a clip."""
        model, bar = self.handle.get("vae"), _Progress(len(batch))
        with _comfyuis_out_of_memory():
            return torch.cat([work(model, one, bar.told(index)) for index, one in enumerate(batch.split(1))])


def vae_shapes(source: VaeSource) -> dict[str, tuple[int, ...]]:
    """The weights and their shapes: under ComfyUI's names, but for Wan's of a pipeline folder, which has diffusers'."""
    if isinstance(source, VaeFile):
        shapes = {name: tuple(weight.shape) for name, weight in read_header(source.path).items()}
    else:
        model = source.family.needs_vae().build(source.vae_config)
        shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in shapes:  # by which ComfyUI knows diffusers' names
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in comfy.diffusers_convert.convert_vae_state_dict(tensors).items()
        }
    return shapes


class _Progress:
    """ComfyUI's progress bar over the pieces of clips; none where each is a single piece, as of images.

    Args:
        count: of clips.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.bar: comfy.utils.ProgressBar | None = None

    def told(self, index: int) -> Callable[[int, int], None]:
        """What is told of the pieces of a clip."""

        def told(done: int, of: int) -> None:
            if of == 1:
                return
            self.bar = self.bar or comfy.utils.ProgressBar(self.count * of)
            self.bar.update_absolute(index * of + done, self.count * of)

        return told


class RemoteVAE(comfy.sd.VAE):
    """A VAE whose weights are in the workers: what `comfy.sd.VAE` finds out from weights is stated here."""

    def __init__(self, handle: ModelHandle, source: VaeSource) -> None:
        # Not super().__init__(), which needs the weights.
        shape = source.family.needs_vae().latent_shape(source.vae_config)
        side, frames = shape.downscale, shape.frames
        self.first_stage_model = RemoteAutoencoder(handle, source)
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: HOST_MEMORY * shape[0]
        self.latent_channels = shape.channels
        self.latent_dim = 2
        self.downscale_ratio: Any = side
        self.upscale_ratio: Any = side
        self.downscale_index_formula: Any = None
        self.upscale_index_formula: Any = None
        if frames:
            self.latent_dim = 3
            self.downscale_ratio = (lambda count: max(0, (count + frames - 1) // frames), side, side)
            self.upscale_ratio = (lambda count: max(0, shape.pictures(count)), side, side)
            self.downscale_index_formula = self.upscale_index_formula = (frames, side, side)
        self.output_channels = 3
        self.pad_channel_value = 1.0 if frames and shape.channels == 16 else None  # as ComfyUI's own
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes = [torch.float32]
        self.disable_offload = False
        self.not_video = False
        self.size = 1
        self.extra_1d_channel = None
        self.crop_input = True
        self.handles_tiling = False
        self.format_encoded = None
        self.audio_sample_rate = 44100
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = torch.float32
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = RemotePatcher(self.first_stage_model, self.device, comfy.model_management.vae_offload_device())

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteVAE:
        copied = copy.copy(self)  # the weights are not here
        copied.patcher = self.patcher.clone()
        return copied

    def get_sd(self) -> dict[str, Tensor]:
        self.patcher.get_key_patches()  # refuses
        return {}


def make_vae(handle: ModelHandle, source: VaeSource) -> RemoteVAE:
    """The VAE of a checkpoint that is in the workers."""
    return RemoteVAE(handle, source)
