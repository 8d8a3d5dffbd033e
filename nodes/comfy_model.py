"""The MODEL: a real ComfyUI model class whose diffusion model has no weights here and is evaluated in the workers."""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ..parallel_backend.families import Conditioning
from ..parallel_backend.loading.checkpoint import Checkpoint
from ..parallel_backend.runtime.errors import BatchTooLargeError
from .cache_run import RUN_KEY
from .comfy_patcher import LARGEST_TIMESTEP, RemotePart, RemotePatcher, meta_state_dict
from .families import Shapes, family_of
from .graph_nodes import makers_before, nodes_before
from .group import ModelHandle, check_interrupted
from .model_options import NodeOf, check_transformer_options
from .remote_modules import RemoteStandIn, add_modules
from .states import refresh

log = logging.getLogger(__name__)

HOST_MEMORY = 64 * 2**20
"""Bytes that an evaluation takes in ComfyUI's own process, generously."""


class RemoteDiffusionModel(RemoteStandIn):
    """Stands where ComfyUI's diffusion model stands, with its attributes and modules but without weights.

    To ``isinstance`` it is what it stands for, as to ``hasattr`` and ``named_modules``.

    Args:
        handle: of the model in the workers.
        source: its checkpoint.
        shapes: its weights under ComfyUI's names.
        config: what ComfyUI's detection says of it.
    """

    label = "the diffusion model"

    def __init__(self, handle: ModelHandle, source: Checkpoint, shapes: Shapes, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.handle, self.source, self.family = handle, source, family_of(source)
        self.part = RemotePart(handle, "transformer")
        self._told = ""
        """Name of the patches of the last evaluation."""
        self.block_count = self.family.block_count(source.transformer_config)
        self.patch_size = self.family.patch_size
        self.dtype = getattr(torch, handle.config.dtype)
        self.node_of: NodeOf = lambda path: None
        """Which node of the MODEL whose turn it is put something into its options; `RemotePatcher` sets it."""
        self._shapes = shapes
        add_modules(self, shapes, self.dtype)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        return meta_state_dict(self._shapes, destination, prefix, self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteDiffusionModel:
        copied = RemoteDiffusionModel(self.handle, self.source, self._shapes, self._config)
        copied.part, copied.stands_for = self.part, self.stands_for
        return copied

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, *positional: Any, **named: Any) -> Tensor:
        """Prediction from latent ``[B, C, H, W]`` (``[B, C, F, H, W]`` where latents have frames).

        Args:
            x: the latent.
            timestep: ``[B]``, or ``[B, F]`` of frames.
            context: ``[B, L, D]``.
            positional: the family's `forward_arguments`.
            named: these and others, as ComfyUI calls it.
        """
        given = dict(zip(self.family.forward_arguments, positional, strict=False)) | named
        ordered = [given.pop(name, None) for name in self.family.forward_arguments[:-1]]
        options = given.pop("transformer_options", None) or {}
        # Wrappers (EasyCache and the like) are run here because ComfyUI's own models run them here.
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(self._evaluate, self, wrappers).execute(
            x, timestep, context, *ordered, options, **given
        )

    def _evaluate(self, x: Tensor, timestep: Tensor, context: Tensor, *positional: Any, **named: Any) -> Tensor:
        given = dict(zip(self.family.forward_arguments, positional, strict=False)) | named
        options = given.pop("transformer_options", None) or {}
        x = self._without_concat(x, given)
        self._refuse(x, timestep, given.pop("control", None), options)
        conditioning = self.family.conditioning(x, context, given, self.source.transformer_config)
        for reference in conditioning.references:
            self.check_latent(reference, "reference latent")
        given.pop("crossattn_controlnet", None)  # for ControlNets, which alone read it
        left = [name for name, value in given.items() if value is not None]
        if left:
            raise ValueError(
                f"the model is given {', '.join(left)}, which {self.source.family.title} in the parallel workers does "
                "not take; bypass the node that adds it"
            )
        uuids = list(options.get("uuids") or ())
        prediction = self._predict(x, timestep, conditioning, options, uuids)
        run = options.get(RUN_KEY)
        if run is not None:
            run.evaluated()
        return prediction.to(x.device)

    def _predict(
        self, x: Tensor, timestep: Tensor, conditioning: Conditioning, options: dict[str, Any], uuids: list[Any]
    ) -> Tensor:
        """A prediction; where there is no room for all conditionings of the batch, of one after the other.

        ComfyUI would divide the batch itself if it knew what is free on the workers' devices.
        """
        run = options.get(RUN_KEY)
        cache = None if run is None else run.plan(self.handle, {**options, "uuids": uuids})
        each, rest = divmod(len(x), max(1, len(uuids)))
        divisible = len(uuids) > 1 and not rest
        model = self.handle.get("transformer")
        try:
            prediction = model.predict(
                x, timestep, conditioning, check_interrupted, cache, divisible=divisible, adapters=self.part.adapters
            )
            if self._told != self.part.adapters.name:
                self._told = self.part.adapters.name
                refresh()  # nodes say which LoRAs are on
            return prediction
        except BatchTooLargeError as error:
            log.info("%s; its %d conditionings are evaluated one after the other", error, len(uuids))
        parts = []
        for index, uuid in enumerate(uuids):
            part = slice(index * each, (index + 1) * each)
            parts.append(self._predict(x[part], timestep[part], part_of(conditioning, part, len(x)), options, [uuid]))
        return torch.cat(parts)

    def _without_concat(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """The latent alone, where ComfyUI has put channels behind its own that are the same in each step."""
        config, kind = self.source.transformer_config, self.source.family.transformer
        beside = kind.concat_channels(config)
        channels = kind.latent_look(config).channels
        if not beside or x.shape[1] == channels:
            return x
        if x.shape[1] != channels + beside:
            raise ValueError(
                f"the latent has {x.shape[1]} channels with those of the conditioning, this model takes {channels} and "
                f"{beside} beside them; use the conditioning node that is made for it"
            )
        given["concat"] = x[:, channels:]
        return x[:, :channels]

    def check_latent(self, latent: Tensor, what: str = "latent") -> None:
        """Raise ValueError, with the node to use, for a latent that the workers cannot take."""
        try:
            self.source.family.transformer.check_latent(latent.shape, self.source.transformer_config, what)
        except ValueError as error:
            instead = f"{self.family.empty_latent}, or an image" if what == "latent" else "an image"
            raise ValueError(
                f"{error}; use {instead} encoded by this model's VAE, and no node that changes the latent's channels"
            ) from None

    def _refuse(self, x: Tensor, timestep: Tensor, control: Any, options: dict[str, Any]) -> None:
        """Raise ValueError for what no family's workers can honour."""
        self.check_latent(x)
        if control is not None:
            who = ", ".join(nodes_before("control_net")) or "a node"
            raise ValueError(
                f"{who} applies a ControlNet, which parallel models do not take in this version; bypass it"
            )
        check_transformer_options(options, self.node_of, ours=(RUN_KEY,))
        scale = self.source.family.transformer.timestep_scale
        if not (timestep.min() >= 0 and timestep.max() <= LARGEST_TIMESTEP * scale):  # which NaN is not, either
            who = self.node_of(("object_patches", "model_sampling")) or ", ".join(makers_before("SIGMAS"))
            raise ValueError(
                f"timesteps up to {timestep.max().item():g} arrived where 0 to {scale:g} are expected; "
                f"{who or 'a model sampling node with another multiplier'} is in the way: bypass it"
            )


def part_of(conditioning: Conditioning, part: slice, batch: int) -> Conditioning:
    """The conditioning of a part of a batch; what is there once stands for all of it."""

    def of(tensor: Tensor) -> Tensor:
        return tensor[part] if len(tensor) == batch else tensor

    return Conditioning(
        of(conditioning.context),
        [of(reference) for reference in conditioning.references],
        {name: of(tensor) for name, tensor in conditioning.tensors.items()},
        conditioning.options,
    )


@functools.cache
def _kept_class(cond_class: Any) -> Any:
    """A kind of conditioning whose tensor is handed to each step as it is, not as a copy, where it is alone."""

    class Kept(cond_class):
        def concat(self, others):
            return super().concat(others) if others else self.cond

    return Kept


@functools.cache
def _remote_class(model_class: Any) -> Any:
    """ComfyUI's class of a model with everything but the diffusion model: conditioning, sampling, latent format."""

    class Remote(model_class):
        def attach(self, diffusion_model: RemoteDiffusionModel) -> None:
            self.diffusion_model = diffusion_model
            # Samplers ask it about an empty latent, before they make noise of the size that it was given: seconds of
            # sound as a video's frames would be gigabytes.
            self.latent_format.fix_empty_latent = self._check_empty
            self.remote_part = diffusion_model.part

        def _check_empty(self, latent):
            self.diffusion_model.check_latent(latent)
            return latent

        def extra_conds(self, **kwargs):
            noise = kwargs.get("noise")
            if noise is not None:  # before it is filled up with channels of the conditioning
                self.diffusion_model.check_latent(noise)
            # ComfyUI would convert and copy the context in each step: 8M numbers of FLUX.2's.
            conds = super().extra_conds(**kwargs)
            context = conds.get("c_crossattn")
            if context is not None:
                device, dtype = kwargs["device"], self.get_dtype_inference()
                tensor = comfy.model_management.cast_to_device(context.cond, device, dtype)
                conds["c_crossattn"] = _kept_class(type(context))(tensor)
            return conds

        def memory_required(self, input_shape, cond_shapes=None):
            return HOST_MEMORY

    # Nodes see what kind of model it is by its class' name, too.
    Remote.__name__, Remote.__qualname__ = model_class.__name__, model_class.__qualname__
    return Remote


def _diffusion_class(model: Any) -> Any:
    """The class of the diffusion model that ComfyUI would have built for one of its models."""

    class Noted(comfy.model_base.BaseModel):
        """Comes between ComfyUI's class and its base, and keeps what the one tells the other to build."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
            self.unet_class = given.get("unet_model")

    return type("Noted", (type(model), Noted), {})(model.model_config).unet_class


def make_model(handle: ModelHandle, source: Checkpoint) -> RemotePatcher:
    """The MODEL of a checkpoint whose transformer is in the workers."""
    family = family_of(source)
    unet_config = {**family.unet_config(source.transformer_config), "disable_unet_model_creation": True}
    shapes = family.weight_shapes(source, unet_config)
    diffusion_model = RemoteDiffusionModel(handle, source, shapes, unet_config)
    # ComfyUI's own model, as its kind has it, but without weights.
    model: Any = family.supported(unet_config).get_model({}, "")
    diffusion_model.stands_for = _diffusion_class(model)
    model.__class__ = _remote_class(model.__class__)
    model.attach(diffusion_model)
    return RemotePatcher(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())
