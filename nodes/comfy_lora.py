"""Patches of weights as ComfyUI's loaders make them (LoRA and the like), for the workers to apply to their shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from comfy.weight_adapter.glora import GLoRAAdapter
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from comfy.weight_adapter.oft import OFTAdapter
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..parallel_backend.loading.adapters import NO_ADAPTERS, OF_WEIGHT, AdapterSet, Patch

SHOWN_TITLES = 4
"""Of several LoRAs, so many are named on a node."""
TAKEN = "LoRA, LoCon, LoHa, LoKr, GLoRA, OFT, DoRA, and plain differences of weights"


Patches = Mapping[str, Sequence[tuple[Any, ...]]]
"""ComfyUI's: key -> ``(strength, value, model strength, offset, function)``, in order."""


def adapter_set(
    patches: Patches,
    name: str,
    anchor: str,
    titles: Sequence[str] = (),
    hooks: Sequence[tuple[float, Patches]] = (),
) -> AdapterSet:
    """All patches of a MODEL's diffusion model, or of a CLIP's language model.

    Args:
        patches: ``ModelPatcher.patches``.
        name: tells sets apart.
        anchor: what of a key stands before the names that the workers know.
        titles: what people call them, `title_of` each.
        hooks: the patches of all hooks that have some, and how strong each is now; 0 where it is off.

    Raises:
        ValueError: a kind that workers do not apply; names it and the key.
    """
    if not patches and not hooks:
        return NO_ADAPTERS
    found = {key: [patch for one in of for patch in patch_of(key, *one)] for key, of in patches.items()}
    for hook_strength, of_hook in hooks:
        for key, of in of_hook.items():
            for strength, value, model_strength, offset, function in of:
                one = patch_of(key, hook_strength * strength, value, model_strength, offset, function, switched=True)
                found.setdefault(key, []).extend(one)
    shown = titles[:SHOWN_TITLES]
    title = ", ".join([*shown, *([f"{len(titles) - len(shown)} more"] if len(titles) > len(shown) else [])])
    return AdapterSet(name, {key.partition(anchor)[2]: of for key, of in found.items() if of}, title)


def title_of(strength: float) -> str:
    """What people call the LoRA that the node that runs now puts on.

    ComfyUI hands over tensors without their file's name, which is an input of its loaders.
    """
    context = get_executing_context()
    running = PromptServer.instance.prompt_queue.get_current_queue_volatile()[0] if context is not None else []
    node = next((prompt[2].get(context.node_id) for prompt in running if prompt[1] == context.prompt_id), None) or {}
    given = (value for value in node.get("inputs", {}).values() if isinstance(value, str))
    files = (PurePath(value).stem for value in given if PurePath(value).suffix in folder_paths.supported_pt_extensions)
    return f"{next(files, node.get('class_type', 'unknown'))} at {strength:g}"


def patch_of(
    key: str,
    strength: float,
    value: Any,
    model_strength: float,
    offset: tuple[int, int, int] | None,
    function: Any,
    switched: bool = False,
) -> list[Patch]:
    """One of ComfyUI's patches as the workers have it; nothing where it changes nothing and is not switched.

    Raises:
        ValueError: see `adapter_set`.
    """
    if function not in (None, comfy.utils.swap_scale_shift):
        raise ValueError(f"a node changes the weight {key} by a function of its own, which workers do not have")
    swap = function is not None
    one = _kind_of(key, value)
    # A hook's LoRA that is off now keeps its place, for when it is on.
    if one.kind != "set" and strength == 0.0 and not (switched and one.low_rank()):
        if model_strength == 1.0:
            return []
        one = Patch("scale", ())
    if swap and one.kind in OF_WEIGHT:
        raise _refused(key, f"{one.kind.upper()} on a weight whose halves ComfyUI has in another order")
    # ComfyUI turns by what strength makes of the rotation, and adds strength of that.
    turn = strength if one.kind == "oft" else 1.0
    if one.dora is None:
        changes = {"strength": strength * turn * one.alpha, "alpha": 1.0}
    else:
        changes = {"strength": strength, "alpha": one.alpha * turn}
    how = {"model_strength": model_strength, "offset": offset, "swap": swap, "switched": switched}
    return [replace(one, **how, **changes)]


def _kind_of(key: str, value: Any) -> Patch:
    """A patch's value, at a strength of 1."""
    if isinstance(value, WeightAdapterBase):
        return _adapter(key, value)
    if isinstance(value, tuple) and len(value) == 1:
        value = ("diff", value)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set"):
        kind, (tensor, *more) = value
        if tensor is None:
            return Patch("scale", ())
        if more and more[0].get("pad_weight"):
            raise _refused(key, "a difference that makes a weight larger")
        return Patch(kind, (tensor,))
    what = value[0] if isinstance(value, tuple) and value and isinstance(value[0], str) else type(value).__name__
    if what == "model_as_lora":
        raise ValueError(
            f"the weight {key} is changed by all of another checkpoint's weights (Create Hook Model as LoRA), which "
            "parallel models do not take in this version; use Create Hook LoRA, with a LoRA that Extract and Save Lora "
            "makes of that checkpoint and this one in ComfyUI's own loaders, or bypass the node"
        )
    raise _refused(key, f"{what!r}")


def _adapter(key: str, adapter: WeightAdapterBase) -> Patch:
    weights: Any = adapter.weights
    tensors: tuple[Tensor, ...]
    of_convolution, rank = False, None
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
    elif isinstance(adapter, GLoRAAdapter):
        *matrices, alpha, dora = weights
        a1, a2, b1, b2 = (matrix.flatten(1) for matrix in matrices)
        kind, of_convolution = "glora", any(matrix.ndim > 2 for matrix in matrices)
        if _is_old_glora(a1, a2, b1, b2):
            a1, a2, b1, b2 = a2, a1, b2, b1
        tensors, rank = (b1, b2, a1, a2), a2.shape[0]
    elif isinstance(adapter, OFTAdapter):
        blocks, _, alpha, dora = weights  # ComfyUI, too, has no use for the second
        kind, tensors = "oft", (_rotation(blocks, alpha),)
        if dora is not None:
            rank, alpha = 1, alpha or 0.0  # which it multiplies by
        else:
            alpha = None
    else:
        raise _refused(key, type(adapter).__name__.removesuffix("Adapter"))
    if of_convolution:
        raise _refused(key, "an adapter of a convolution")
    factor = float(alpha / rank) if alpha is not None and rank is not None else 1.0
    return Patch(kind, tensors, dora=None if dora is None else dora.flatten(1) if dora.ndim > 1 else dora, alpha=factor)


def _is_old_glora(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Whether a GLoRA's matrices are the other way round, as older LyCORIS has them: ``W @ a2 @ a1 + b2 @ b1``."""
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    # Where both can be, the weight is square, and its side is not the smaller number.
    return old and (not new or a2.shape[0] >= a2.shape[1])


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What was made of tensors of a file, so that it is the same tensor each time and is sent once."""


def _rotation(blocks: Tensor, alpha: float | None) -> Tensor:
    """OFT's rotations ``[blocks, size, size]`` (Cayley transform), fp32."""
    limit = float(alpha or 0.0)
    kept = _made.get(blocks)
    if kept is None or kept[0] != limit:
        skew = blocks.float() - blocks.float().transpose(1, 2)
        norm = float(skew.norm()) + 1e-8
        if 0 < limit < norm:
            skew = skew * limit / norm
        one = torch.eye(skew.shape[1])
        kept = _made[blocks] = (limit, (one + skew) @ (one - skew).inverse())
    return kept[1]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32."""
    kept = _made.get(a)
    if kept is None or kept[0] is not b:
        kept = _made[a] = (b, torch.mm(a.float(), b.float()))
    return kept[1]


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
