"""The ModelPatcher of everything that lives in the workers: it takes no memory, and refuses what it cannot honour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.model_patcher
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet
from .comfy_lora import adapter_set, check_patches, title_of
from .group import ModelHandle
from .shared_memory import ANY_REQUEST

LARGEST_TIMESTEP = 1.001
"""Models take timesteps up to that of pure noise, give or take what is lost in rounding."""


TITLES = "hybrid_dit_loras"
"""The attachment of a patcher with what people call its patches."""
ANCHORS = {"transformer": "diffusion_model.", "text_encoder": ".transformer."}
"""Components that take patches of weights -> what stands in ComfyUI's keys before the names that the workers know."""


@dataclass
class RemotePart:
    """What of which model in the workers an object stands for; its attribute ``remote_part``.

    ``adapters`` are the patches of its weights (LoRA) of the object whose turn it is; `RemotePatcher` sets them.
    """

    handle: ModelHandle
    component: str
    adapters: AdapterSet = NO_ADAPTERS


def meta_state_dict(
    shapes: Mapping[str, tuple[int, ...]],
    destination: dict[str, torch.Tensor] | None,
    prefix: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """What ``state_dict`` of a module answers whose weights are in the workers: tensors without memory.

    Stock loaders look there for the names and shapes that a patch may have, and drop a patch that they find no name
    for; what they find one for, `RemotePatcher` refuses. PyTorch collects the state of a whole model in
    ``destination`` and drops what is returned.
    """
    found = {} if destination is None else destination
    for name, shape in shapes.items():
        found[prefix + name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher around a module without parameters. Sampling options and patches of weights work as ever."""

    current_hooks: Any

    def __init__(self, model, load_device, offload_device, size=1, weight_inplace_update=False):
        super().__init__(model, load_device, offload_device, size=size, weight_inplace_update=weight_inplace_update)

    def detach(self, unpatch_all: bool = True) -> Any:
        # ComfyUI wants memory back (for something else, or its user unloads models), unless a clone takes over.
        part: RemotePart | None = getattr(self.model, "remote_part", None)
        if unpatch_all and part is not None:
            part.handle.offload(part.component)
        return super().detach(unpatch_all)

    # ComfyUI asks a model that has more on a device for what it lacks there, and one that has less for everything.

    def loaded_size(self) -> int:
        part: RemotePart | None = getattr(self.model, "remote_part", None)
        return ANY_REQUEST if part is not None and part.handle.is_there(self.load_device) else 0

    def current_loaded_device(self) -> Any:
        return self.offload_device  # or `loaded_size` would count as memory that the next load gives back

    def partially_unload(self, device_to: Any, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        part: RemotePart | None = getattr(self.model, "remote_part", None)
        return 0 if part is None else part.handle.lend(self.load_device, math.ceil(memory_to_free))

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        # Nothing is loaded here, so all of it, however little memory ComfyUI has left.
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def load(self, *args: Any, **kwargs: Any) -> None:
        # Clones (such as one with a LoRA) share the model; ComfyUI loads the one whose turn it is.
        self._patch(None)
        super().load(*args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights)
        part = self._patched_part()
        if unpatch_weights and part is not None:
            part.adapters = NO_ADAPTERS
        return result

    def _patch(self, hooks: Any) -> None:
        """Have the workers' weights be patched as this object's are, and by a group of hooks; with the next request."""
        part = self._patched_part()
        if part is None:
            if self.patches:  # put there past `add_patches`
                _refuse_weights(len(self.patches))
            return
        now = {} if hooks is None else {hook.hook_ref: hook.strength for hook in hooks.hooks}
        # All hooks' patches are there, those that are off with a strength of 0: the workers change numbers alone.
        strengths = [now.get(reference, 0.0) for reference in self.hook_patches]
        name = " ".join(map(str, [self.patches_uuid, *strengths]))
        of = list(zip(strengths, self.hook_patches.values(), strict=True))
        titles = self.get_attachment(TITLES) or ()
        part.adapters = adapter_set(self.patches, name, ANCHORS[part.component], titles, of)

    def _patched_part(self) -> RemotePart | None:
        """What patches of weights go to; None where there is none that takes them."""
        part: RemotePart | None = getattr(self.model, "remote_part", None)
        return part if part is not None and part.component in ANCHORS else None

    # What cannot be honoured is refused by the node that asks for it, before anything is computed.

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        self._check_patches(patches, strength_patch, strength_model)
        if self._patched_part() is None:
            return list(patches)
        if patches and strength_patch:
            # Clones take attachments along.
            self.set_attachments(TITLES, (*(self.get_attachment(TITLES) or ()), title_of(strength_patch)))
        return super().add_patches(patches, strength_patch, strength_model)

    def _check_patches(self, patches: Mapping[Any, Any], strength: float, model_strength: float) -> None:
        """Raise ValueError for patches that this object's weights cannot have."""
        part = self._patched_part()
        if part is None:
            if patches and (strength, model_strength) != (0.0, 1.0):
                _refuse_weights(len(patches))
            return
        if not patches and strength and part.component == "transformer":  # few LoRAs have something for a text encoder
            raise ValueError(
                "the LoRA changes no weight that this model has; it is for another model, or in a form that ComfyUI "
                "does not read (its log names the weights)"
            )
        check_patches(patches, {key: tensor.shape for key, tensor in self.model.state_dict().items()})

    def set_injections(self, key: str, injections: list[Any]) -> None:
        if injections:
            raise ValueError(
                f"{key} (such as a bypass LoRA loader) changes modules that live in the parallel workers, which is not "
                "possible; bypass the node"
            )
        super().set_injections(key, injections)

    def set_model_patch(self, patch: Any, name: str) -> None:
        _refuse_block_patch(name)

    def set_model_patch_replace(self, patch: Any, name: str, block_name: str, number: int, *_: Any, **__: Any) -> None:
        _refuse_block_patch(f"{name} in {block_name} {number}")

    def set_model_optimized_attention(self, optimized_attention: Any) -> None:
        _refuse_block_patch("attention")

    def set_model_rope_options(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "this node changes the model's position encoding (rope_options), which the parallel workers do not take; "
            "bypass it"
        )

    def add_hook_patches(
        self, hook: Any, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        self._check_patches(patches, strength_patch, strength_model)
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def patch_hooks(self, hooks: Any) -> None:
        if hooks is not None or self.current_hooks is not None:  # else it may be a clone's turn
            self._patch(hooks)
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        self.patch_hooks(None)

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        raise ValueError(
            f"a node (such as one that trains a LoRA) wraps the weight {name}, which lives in the parallel workers; "
            "bypass it"
        )

    def add_object_patch(self, name: str, obj: Any) -> None:
        if name.split(".")[0] in ("diffusion_model", "first_stage_model", "cond_stage_model"):
            raise ValueError(
                f"a node (such as TorchCompileModel) replaces {name}, which lives in the parallel workers; bypass it"
            )
        if name == "model_sampling":
            self._check_sampling(float(obj.timestep(obj.sigma_max)))
        super().add_object_patch(name, obj)

    def _check_sampling(self, largest: float) -> None:
        scale = self.model.diffusion_model.source.family.transformer.timestep_scale
        if largest > LARGEST_TIMESTEP * scale:
            raise ValueError(
                f"this model sampling hands the model timesteps up to {largest:g}, where it expects 0 to {scale:g}; "
                "bypass the node, or use ModelSamplingAuraFlow or ModelSamplingFlux"
            )

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        if key == COMPILE_KEY:
            raise ValueError(
                "TorchCompileModel compiles the diffusion model, which lives in the parallel workers; bypass that node"
            )
        super().add_wrapper_with_key(wrapper_type, key, wrapper)

    def set_model_compute_dtype(self, dtype: Any) -> None:
        raise ValueError(
            "the compute dtype of a parallel model is chosen on its loader node; bypass the node that sets it"
        )

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        raise ValueError("a parallel model has no weights in this process: it can be neither merged nor saved")

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict:
        return self.get_key_patches()


def _refuse_weights(count: int) -> NoReturn:
    raise ValueError(
        f"a node changes {count} weights of a VAE that lives in the parallel workers, which is not possible; bypass "
        "it, or use ComfyUI's own loader"
    )


def _refuse_block_patch(what: str) -> NoReturn:
    raise ValueError(
        f"this node patches the model's blocks ({what}), which live in the parallel workers; bypass the node"
    )
