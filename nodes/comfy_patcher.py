"""The ModelPatcher of everything that lives in the workers: it takes no memory, and refuses what it cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from .group import ModelHandle


@dataclass(frozen=True)
class RemotePart:
    """What of which model in the workers an object stands for; its attribute ``remote_part``."""

    handle: ModelHandle
    component: str


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
    """A ModelPatcher around a module without parameters. Sampling options work as ever; changes to weights do not."""

    def __init__(self, model, load_device, offload_device, size=1, weight_inplace_update=False):
        super().__init__(model, load_device, offload_device, size=size, weight_inplace_update=weight_inplace_update)

    def detach(self, unpatch_all: bool = True) -> Any:
        # ComfyUI wants memory back (for something else, or its user unloads models), unless a clone takes over.
        part: RemotePart | None = getattr(self.model, "remote_part", None)
        if unpatch_all and part is not None:
            part.handle.offload(part.component)
        return super().detach(unpatch_all)

    def load(self, *args: Any, **kwargs: Any) -> None:
        if self.patches:
            raise ValueError(
                f"{len(self.patches)} weights are patched (by a LoRA loader or a model merge), which the parallel "
                "workers do not take in this version; bypass that node, or use a checkpoint that it is merged into"
            )
        super().load(*args, **kwargs)

    def inject_model(self) -> None:
        if self.injections:
            raise ValueError(
                f"{', '.join(self.injections)} (such as a bypass LoRA loader) changes modules that live in the "
                "parallel workers, which is not possible; bypass that node"
            )
        super().inject_model()

    def patch_hooks(self, hooks: Any) -> None:
        if hooks is not None and self.get_combined_hook_patches(hooks):
            raise ValueError(
                "a LoRA or weight hook (Create Hook LoRA) changes weights that live in the parallel workers, which is "
                "not possible in this version; bypass that node"
            )

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        pass

    def add_object_patch(self, name: str, obj: Any) -> None:
        if name.split(".")[0] in ("diffusion_model", "first_stage_model", "cond_stage_model"):
            raise ValueError(
                f"a node (such as TorchCompileModel) replaces {name}, which lives in the parallel workers; bypass it"
            )
        super().add_object_patch(name, obj)

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
