"""The MODEL: a real ComfyUI model class whose diffusion model has no weights here and is evaluated in the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor, nn

from ..parallel_backend.families import Conditioning
from ..parallel_backend.loading.checkpoint import Checkpoint
from .cache_run import RUN_KEY
from .comfy_patcher import RemotePart, RemotePatcher, meta_state_dict
from .group import ModelHandle, check_interrupted

HOST_MEMORY = 64 * 2**20
"""Bytes that an evaluation takes in ComfyUI's own process, generously."""


class RemoteDiffusionModel(nn.Module):
    """Stands where ComfyUI's diffusion model stands, with its attributes but without parameters."""

    patch_size = 1

    def __init__(
        self, handle: ModelHandle, channels: int, block_count: int, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.handle = handle
        self.block_count = block_count
        self.channels = channels
        self.dtype = getattr(torch, handle.config.dtype)
        self._shapes = shapes

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return meta_state_dict(self._shapes, destination, prefix, self.dtype)

    def __getattr__(self, name: str) -> Any:
        # Who looks for a block here wants to change it. ComfyUI's bypass LoRA goes on with a line in the log where the
        # block is not found, and the LoRA would be ignored.
        if any(weight.partition(".")[0] == name for weight in self.__dict__.get("_shapes", ())):
            raise ValueError(
                f"a node (such as a bypass LoRA loader) reaches into the model's {name}, which lives in the parallel "
                "workers; bypass that node"
            )
        return super().__getattr__(name)

    def forward(self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
                transformer_options=None, **kwargs):  # fmt: skip
        """Prediction from latent ``[B, C, H, W]``, timestep ``[B]``, context ``[B, L, D]``, as ComfyUI calls it."""
        options = transformer_options or {}
        # Wrappers (EasyCache and the like) are run here because ComfyUI's own models run them here.
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(self._evaluate, self, wrappers).execute(
            x, timestep, context, y, guidance, ref_latents, control, options, **kwargs
        )

    def _evaluate(self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None,
                  transformer_options=None, **kwargs) -> Tensor:  # fmt: skip
        options = transformer_options or {}
        _refuse(x, timestep, control, options, kwargs, self.channels)
        run = options.get(RUN_KEY)
        prediction = self.handle.get().predict(
            x,
            timestep,
            Conditioning(context, list(ref_latents or ()), {} if guidance is None else {"guidance": guidance}),
            check=check_interrupted,
            cache=None if run is None else run.plan(self.handle, options),
        )
        if run is not None:
            run.evaluated()
        return prediction.to(x.device)


def _refuse(
    x: Tensor, timestep: Tensor, control: Any, options: dict[str, Any], kwargs: dict[str, Any], channels: int
) -> None:
    """Raise ValueError for what the workers would have to ignore."""
    if x.shape[1] != channels:
        raise ValueError(
            f"the latent has {x.shape[1]} channels, this model takes {channels}; use EmptyFlux2LatentImage (or an "
            "image encoded by this model's VAE), and no node that adds channels to the model's input"
        )
    if control is not None:
        raise ValueError("a ControlNet is applied, which parallel models do not take in this version; bypass it")
    patched = [str(name) for kind in ("patches", "patches_replace") for name in options.get(kind) or ()]
    if patched:
        raise ValueError(
            f"a node patches the model's blocks ({', '.join(patched)}), which live in the parallel workers; bypass it"
        )
    if options.get("rope_options"):
        raise ValueError(
            "a node changes the model's position encoding (rope_options), which is not supported; bypass it"
        )
    if kwargs.get("attention_mask") is not None:
        raise ValueError("the conditioning has an attention mask for parts of the image, which is not supported")
    method = kwargs.get("ref_latents_method") or "index"
    if method != "index":
        raise ValueError(
            f"the reference latents ask for the method {method!r}; FLUX.2 in the parallel workers takes 'index' "
            "(bypass the node that chooses the method)"
        )
    if timestep.min() < 0 or timestep.max() > 1.001:
        raise ValueError(
            f"timesteps up to {timestep.max().item():g} arrived where sigmas from 0 to 1 are expected; a model "
            "sampling node with a multiplier is in the way"
        )


class RemoteFlux2(comfy.model_base.Flux2):
    """ComfyUI's Flux2 with everything but the diffusion model: conditioning, sampling, latent format."""

    def __init__(self, model_config: Any, diffusion_model: RemoteDiffusionModel) -> None:
        super().__init__(model_config)
        self.diffusion_model = diffusion_model
        self.remote_part = RemotePart(diffusion_model.handle, "transformer")

    def memory_required(self, input_shape, cond_shapes=None):
        return HOST_MEMORY


def make_model(handle: ModelHandle, source: Checkpoint) -> RemotePatcher:
    """The MODEL of a checkpoint whose transformer is in the workers."""
    return _MAKERS[source.family.name](handle, source)


def _make_flux2(handle: ModelHandle, source: Checkpoint) -> RemotePatcher:
    config = source.transformer_config
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    unet_config = {
        "image_model": "flux2",
        "disable_unet_model_creation": True,
        "in_channels": config["in_channels"],
        "out_channels": config.get("out_channels") or config["in_channels"],
        "hidden_size": hidden,
        "num_heads": config["num_attention_heads"],
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "context_in_dim": config["joint_attention_dim"],
        "patch_size": 1,
    }
    shapes = _comfy_shapes(source, unet_config)
    block_count = config["num_layers"] + config["num_single_layers"]
    diffusion_model = RemoteDiffusionModel(handle, config["in_channels"], block_count, shapes)
    model = RemoteFlux2(comfy.supported_models.Flux2(unet_config), diffusion_model)
    return RemotePatcher(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())


_MAKERS: dict[str, Callable[[ModelHandle, Checkpoint], RemotePatcher]] = {"flux2": _make_flux2}


def _comfy_shapes(source: Checkpoint, unet_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's weights under ComfyUI's names, q, k and v fused."""
    table = comfy.utils.flux_to_diffusers(unet_config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in source.family.build_transformer(source.transformer_config).named_parameters():
        target = table.get(name)
        if target is None:
            # The few that ComfyUI's table lacks differ by these parts of their names.
            for ours, theirs in _FLUX2_RENAMES.items():
                name = name.replace(ours, theirs)
            shapes[name] = tuple(parameter.shape)
        elif isinstance(target, str):
            shapes[target] = tuple(parameter.shape)
        elif target[1] is None:
            shapes[target[0]] = tuple(parameter.shape)
        else:
            rows = target[1][1] + target[1][2]
            shapes[target[0]] = (max(rows, shapes.get(target[0], (0,))[0]), *parameter.shape[1:])
    return shapes


_FLUX2_RENAMES = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
