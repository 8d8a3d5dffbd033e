"""Patches of weights as ComfyUI's loaders make them (LoRA and the like), for the workers to apply to their shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet, Patch

PREFIX = "diffusion_model."
TAKEN = "LoRA, LoCon, LoHa, LoKr, and plain differences of weights"


def adapter_set(patches: Mapping[str, Sequence[tuple[Any, ...]]], name: str) -> AdapterSet:
    """All patches of a MODEL's diffusion model.

    Args:
        patches: ``ModelPatcher.patches``: key -> ``(strength, value, model strength, offset, function)``, in order.
        name: tells sets apart, ``ModelPatcher.patches_uuid``.

    Raises:
        ValueError: a kind that workers do not apply; names it and the key.
    """
    if not patches:
        return NO_ADAPTERS
    found = {key: [patch for one in of for patch in patch_of(key, *one)] for key, of in patches.items()}
    return AdapterSet(name, {key.removeprefix(PREFIX): of for key, of in found.items() if of})


def patch_of(
    key: str, strength: float, value: Any, model_strength: float, offset: tuple[int, int, int] | None, function: Any
) -> list[Patch]:
    """One of ComfyUI's patches as the workers have it; nothing where it changes nothing.

    Raises:
        ValueError: see `adapter_set`.
    """
    if function not in (None, comfy.utils.swap_scale_shift):
        raise ValueError(f"a node changes the weight {key} by a function of its own, which workers do not have")
    swap = function is not None
    kind, tensors, factor = _kind_of(key, value)
    if kind != "set" and strength == 0.0:
        if model_strength == 1.0:
            return []
        kind, tensors = "scale", ()
    return [Patch(kind, tensors, strength * factor, model_strength, offset, swap)]


def _kind_of(key: str, value: Any) -> tuple[str, tuple[Tensor, ...], float]:
    """Kind and tensors of a patch's value, and what the strength is multiplied by."""
    if isinstance(value, WeightAdapterBase):
        return _kind_of_adapter(key, value)
    if isinstance(value, tuple) and len(value) == 1:
        value = ("diff", value)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set"):
        kind, (tensor, *more) = value
        if tensor is None:
            return "scale", (), 1.0
        if more and more[0].get("pad_weight"):
            raise _refused(key, "a difference that makes a weight larger")
        return kind, (tensor,), 1.0
    what = value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else type(value).__name__
    raise _refused(key, f"{what!r}")


def _kind_of_adapter(key: str, adapter: WeightAdapterBase) -> tuple[str, tuple[Tensor, ...], float]:
    weights: Any = adapter.weights
    tensors: tuple[Tensor, ...]
    if isinstance(adapter, LoRAAdapter):
        up, down, alpha, middle, dora, reshape = weights
        if reshape is not None:
            raise _refused(key, "a LoRA that makes a weight larger (reshape_weight)")
        kind, of_convolution, rank = "lora", middle is not None, down.shape[0]
        tensors = up.flatten(1), down.flatten(1)
    elif isinstance(adapter, LoHaAdapter):
        a1, b1, alpha, a2, b2, t1, _, dora = weights
        kind, of_convolution, rank = "loha", t1 is not None, b1.shape[0]
        tensors = a1, b1, a2, b2
    elif isinstance(adapter, LoKrAdapter):
        w1, w2, alpha, a1, b1, a2, b2, t2, dora = weights
        kind, of_convolution = "lokr", t2 is not None or any(w is not None and w.ndim > 2 for w in (w1, w2))
        # The rank of the last factor that is decomposed; whole factors have no alpha. As ComfyUI has it.
        rank = b2.shape[0] if w2 is None else b1.shape[0] if w1 is None else None
        tensors = (_product(a1, b1) if w1 is None else w1, _product(a2, b2) if w2 is None else w2)
    else:
        raise _refused(key, type(adapter).__name__.removesuffix("Adapter"))
    if of_convolution:
        raise _refused(key, "an adapter of a convolution")
    if dora is not None:
        raise _refused(key, "DoRA")
    return kind, tensors, alpha / rank if alpha is not None and rank is not None else 1.0


_products: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32; the same tensor each time, so that it is sent once."""
    key = (a.data_ptr(), b.data_ptr())
    kept = _products.get(key)
    if kept is None or kept[0] is not a or kept[1] is not b:
        if len(_products) > 4096:
            _products.clear()
        kept = _products[key] = (a, b, torch.mm(a.float(), b.float()))
    return kept[2]


def _refused(key: str, what: str) -> ValueError:
    return ValueError(
        f"the weight {key} is changed by {what}, which parallel models do not take in this version; they take {TAKEN}. "
        "Bypass the node, or load a checkpoint that it is merged into"
    )


def check_patches(patches: Mapping[Any, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for patches that do not fit the weights that they name: how many of how many, and the first.

    Args:
        patches: as ``ModelPatcher.add_patches`` gets them: keys, or ``(key, offset[, function])``, and values.
        shapes: of the model's weights; names that it lacks are left to ComfyUI, which says so.
    """
    wrong, looked_at = [], 0
    for name, value in patches.items():
        key, offset, function = (name, None, None) if isinstance(name, str) else (*name, None)[:3]
        if key not in shapes:
            continue
        looked_at += 1
        for patch in patch_of(key, 1.0, value, 1.0, offset, function):
            try:
                patch.check(tuple(shapes[key]))
            except ValueError as error:
                wrong.append(f"{key} {error}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {looked_at} weights that the LoRA changes have another size in this model: {wrong[0]}; "
            "it is a LoRA for another model"
        )
