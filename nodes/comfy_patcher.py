"""The ModelPatcher of everything that lives in the workers: it takes no memory, and refuses what it cannot honour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.model_patcher
import torch

from ..parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet
from .comfy_lora import adapter_set, check_patches, title_of
from .graph_nodes import executing_node, this_node
from .group import ModelHandle
from .model_options import SAMPLING_FUNCTIONS, Path, paths, say_once
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

    def __deepcopy__(self, memo: dict[int, Any]) -> RemotePart:
        return self  # the model in the workers is one


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
    """A ModelPatcher around a module without weights. Options and patches of weights work as ever.

    What cannot be honoured is refused by the node that asks for it, before anything is computed; what a node puts there
    past the methods, when it would be used, by the name of the node. ``docs/comfyui_nodes.md`` has the whole list.
    """

    current_hooks: Any

    def __init__(self, model, load_device, offload_device, size=1, weight_inplace_update=False):
        super().__init__(model, load_device, offload_device, size=size, weight_inplace_update=weight_inplace_update)
        self._device, self._device_was_chosen = load_device, False
        self._made_by: str | None = None
        """The node that this is the output of."""
        self._earlier: tuple[tuple[str | None, frozenset[Path]], ...] = ()
        """The nodes before it, each with what there was when the next one took over."""

    def clone(self, *args: Any, force_deepcopy: bool = False, **kwargs: Any) -> RemotePatcher:
        if force_deepcopy:
            raise ValueError(
                f"{this_node()} (such as one that trains) takes a copy of the model's weights to change, which live "
                "in the parallel workers; use ComfyUI's own loader for it"
            )
        clone = super().clone(*args, **kwargs)
        clone._earlier = (*self._earlier, (self._made_by, self._carried()))
        clone._made_by = executing_node()
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> RemotePatcher:
        return self.clone()  # the weights are not here

    def _carried(self) -> frozenset[Path]:
        here = {("object_patches", name) for name in self.object_patches} | {
            ("injections", key) for key in self.injections
        }
        return paths(self.model_options) | here | {("weights", name) for name in self.weight_wrapper_patches}

    def node_of(self, path: Path) -> str | None:
        """The node that put something into this patcher; of ``transformer_options``, where the path has none before.

        What none has put there, a function may add that is called while sampling: then those that have one.
        """
        wanted = path if path[0] in ("object_patches", "injections", "weights") else ("transformer_options", *path)
        adders: dict[str | None, None] = {}
        before: frozenset[Path] = frozenset()
        for node, carried in (*self._earlier, (self._made_by, self._carried())):
            if wanted in carried:
                return node
            if any(new[0] in SAMPLING_FUNCTIONS for new in carried - before):
                adders[node] = None
            before = carried
        return " or ".join(node for node in adders if node) or None

    def pre_run(self) -> None:
        super().pre_run()
        part = self._patched_part()
        if part is not None and part.component == "transformer":
            self.model.diffusion_model.node_of = self.node_of

    @property
    def load_device(self) -> Any:
        """Where ComfyUI hands its tensors over; the workers' devices are the layout's."""
        return self._device

    @load_device.setter
    def load_device(self, device: Any) -> None:
        if not hasattr(self, "_device"):
            self._device = device
        else:
            self._keep_device(device)

    def _keep_device(self, device: Any) -> None:
        self._device_was_chosen = True
        say_once(
            f"{this_node()} chooses the device {device} for a model in parallel workers: it stays on those of its "
            "Parallel Layout"
        )

    def deepclone_multigpu(self, new_load_device: Any = None, models_cache: Any = None) -> RemotePatcher:
        clone = self.clone()
        clone._keep_device(new_load_device)
        return clone

    def set_additional_models(self, key: str, models: list[Any]) -> None:
        # MultiGPU CFG Split has one copy of the model for each of ComfyUI's devices.
        super().set_additional_models(key, [] if key == "multigpu" else models)

    def _load_list(self, *_: Any, **__: Any) -> list[Any]:
        return []  # no weights to move or patch

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
        self._check_carried()
        # Nothing is loaded here, so all of it, however little memory ComfyUI has left.
        return super().partially_load(device_to, 1e32, force_patch_weights)

    def load(self, *args: Any, **kwargs: Any) -> None:
        # Clones (such as one with a LoRA) share the model; ComfyUI loads the one whose turn it is.
        self._patch(None)
        super().load(*args, **kwargs)

    def patch_model(self, *args: Any, **kwargs: Any) -> Any:
        self._check_carried()
        return super().patch_model(*args, **kwargs)

    def _check_carried(self) -> None:
        """Refuse what a node has put there past the methods below, before ComfyUI makes use of it."""
        for key, injections in self.injections.items():
            self._check_injections(key, injections, self.node_of(("injections", key)) or "a node")
        for name in self.weight_wrapper_patches:
            self._refuse_weight_wrapper(name, self.node_of(("weights", name)) or "a node")
        for name, obj in self.object_patches.items():
            self._check_object_patch(name, obj, self.node_of(("object_patches", name)) or "a node")

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
                "does not read (its log names the weights); choose another one, or bypass the node"
            )
        check_patches(patches, {key: tensor.shape for key, tensor in self.model.state_dict().items()})

    def set_injections(self, key: str, injections: list[Any]) -> None:
        self._check_injections(key, injections, this_node())
        super().set_injections(key, injections)

    def _check_injections(self, key: str, injections: list[Any], node: str) -> None:
        if injections:
            raise ValueError(
                f"{node} ({key}, such as a bypass LoRA loader) changes modules that live in the parallel workers, "
                "which is not possible; use Load LoRA (Model) in its place, or bypass it"
            )

    def set_model_patch(self, patch: Any, name: str) -> None:
        _refuse_block_patch(name)

    def set_model_patch_replace(self, patch: Any, name: str, block_name: str, number: int, *_: Any, **__: Any) -> None:
        _refuse_block_patch(f"{name} in {block_name} {number}")

    def set_model_rope_options(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"{this_node()} changes the model's position encoding (rope_options), which the parallel workers do not "
            "take; bypass it"
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
        self._refuse_weight_wrapper(name, this_node())

    def _refuse_weight_wrapper(self, name: str, node: str) -> NoReturn:
        raise ValueError(
            f"{node} (such as one that trains a LoRA) wraps the weight {name}, which lives in the parallel workers; "
            "bypass it"
        )

    def add_object_patch(self, name: str, obj: Any) -> None:
        self._check_object_patch(name, obj, this_node())
        super().add_object_patch(name, obj)

    def _check_object_patch(self, name: str, obj: Any, node: str) -> None:
        if name.split(".")[0] in ("diffusion_model", "first_stage_model", "cond_stage_model"):
            raise ValueError(
                f"{node} (such as TorchCompileModel) replaces {name}, which lives in the parallel workers; bypass it"
            )
        if name == "manual_cast_dtype":
            self._refuse_compute_dtype(node)
        if name == "model_sampling":
            self._check_sampling(float(obj.timestep(obj.sigma_max)), node)

    def _check_sampling(self, largest: float, node: str) -> None:
        scale = self.model.diffusion_model.source.family.transformer.timestep_scale
        if largest > LARGEST_TIMESTEP * scale:
            raise ValueError(
                f"{node} chooses a model sampling that hands the model timesteps up to {largest:g}, where it expects 0 "
                f"to {scale:g}; bypass the node, or use ModelSamplingAuraFlow or ModelSamplingFlux"
            )

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Any) -> None:
        # TorchCompileModel's key is "torch.compile"; other packs' are much like it.
        if "compile" in str(key).lower():
            raise ValueError(
                f"{this_node()} (as TorchCompileModel does) compiles the diffusion model, which lives in the parallel "
                "workers; bypass it"
            )
        super().add_wrapper_with_key(wrapper_type, key, wrapper)

    def set_model_compute_dtype(self, dtype: Any) -> None:
        if not self._device_was_chosen:  # or ComfyUI asks for what that device would need
            self._refuse_compute_dtype(this_node())

    def _refuse_compute_dtype(self, node: str) -> NoReturn:
        raise ValueError(
            f"{node} sets the compute dtype of a parallel model, which is chosen on its loader node; bypass it"
        )

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        raise ValueError(
            f"{this_node()} wants the weights of a parallel model, which are not in this process: it can be neither "
            "merged nor saved, and no LoRA can be made of it; use ComfyUI's own loader for that"
        )

    def patch_weight_to_device(self, *_: Any, **__: Any) -> Any:
        return self.get_key_patches()

    def model_state_dict_for_saving(self, model: Any = None, prefix: str = "") -> dict:
        return self.get_key_patches()


def _refuse_weights(count: int) -> NoReturn:
    raise ValueError(
        f"{this_node()} changes {count} weights of a VAE that lives in the parallel workers, which is not possible; "
        "bypass it, or use ComfyUI's own loader"
    )


def _refuse_block_patch(what: str) -> NoReturn:
    raise ValueError(
        f"{this_node()} patches the model's blocks ({what}), which live in the parallel workers; bypass the node, or "
        "use ComfyUI's own loader"
    )
