"""set_lora: LoRA files on the transformer of a diffusers pipeline, whole or sharded, and off it again to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .families import Model, family_of_transformer
from .loading.adapted_weights import AdaptedWeights
from .loading.adapters import AdapterSet
from .loading.lora_file import read_loras
from .loading.weight_loader import share
from .mesh import SINGLE, Axis, raise_together
from .parallelize import LORA, forget_values, parallel_state, refuse_peft, transformer_of


@dataclass
class _Clean:
    """The weights that LoRAs have changed, as they were: in host memory, a share of them on each rank that has them.

    Args:
        world: all ranks of the model.
        replicas: those that hold the same slices as this one.
        owners: parameter -> which of those keeps it.
        weights: those that this one keeps.
        names: of all that are changed.
    """

    world: Axis
    replicas: Axis
    owners: Mapping[str, int]
    weights: dict[str, Tensor] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def keep(self, name: str, weight: Tensor) -> None:
        """Before it is changed."""
        if name not in self.names:
            self.names.add(name)
            if self.owners[name] == self.replicas.rank:
                self.weights[name] = weight.detach().to("cpu", copy=True)

    def restore(self, name: str, weight: Tensor) -> None:
        """Put a weight back. Collective over the replicas."""
        if name in self.weights:
            weight.copy_(self.weights[name])
        if self.replicas.is_split:
            dist.broadcast(weight, group=self.replicas.group, group_src=self.owners[name])

    def drop(self, name: str) -> None:
        """It is not changed any more."""
        self.names.discard(name)
        self.weights.pop(name, None)


@torch.no_grad()
def set_lora(pipe_or_model: Any, loras: Sequence[tuple[str | Path, float]]) -> Any:
    """Have the transformer of a pipeline be changed by some LoRA files, and by no others.

    They are merged into the weights, each rank's slices of them: in fp32, rounded once. Weights as they were are kept
    in host memory, those that a LoRA changes, once among all ranks that hold the same slices; without LoRAs they come
    back to the bit. Graphs and compiled blocks stay valid. Text encoders are not changed.

    Args:
        pipe_or_model: as `enable_cache` takes it. Where that is to shard it, it comes first.
        loras: files and their strengths, in order; ones that were there before are taken off. With several ranks all
            make this call, with the same LoRAs.

    Returns:
        ``pipe_or_model``.

    Raises:
        ValueError: an unsupported model, a file that cannot be read or is for another model, a kind that is not read
            (docs/lora.md), or weights that cannot be changed, such as quantized ones. Nothing is changed then.
    """
    transformer = transformer_of(pipe_or_model)
    state = parallel_state(transformer)
    kind = family_of_transformer(type(transformer).__name__).transformer
    world, tp, replicas = (SINGLE,) * 3 if state is None else (state.mesh.world, state.mesh.tp, state.mesh.cp)
    table = {} if state is None else state.table
    clean: _Clean | None = getattr(transformer, LORA, None)
    world = world if clean is None else clean.world  # also after disable_cache
    error: Exception | None = None
    adapters = AdapterSet("")
    try:
        _check_weights(transformer)
        adapters = read_loras(kind, dict(transformer.config), [_checked(lora) for lora in loras])
    except ValueError as found:
        error = found
    raise_together(error, world)

    weights = AdaptedWeights(transformer, kind.file_rows, table, tp, transformer.dtype)
    places = dict(transformer.named_parameters())
    if clean is None:
        sizes = {name: weight.numel() for name, weight in places.items()}
        clean = _Clean(world, replicas, share(sizes, replicas.degree))
    changed = weights.changed(adapters)
    for name in sorted(changed):
        clean.keep(name, places[name].data)
    # From here on weights may be anything until this is through; a later call puts all of them back.
    setattr(transformer, LORA, clean)
    for name in sorted(clean.names):
        clean.restore(name, places[name].data)
        if name not in changed:
            clean.drop(name)
    weights.apply(adapters, changed)
    forget_values(transformer)
    if not changed:
        delattr(transformer, LORA)
    return pipe_or_model


def _checked(lora: Any) -> tuple[str | Path, float]:
    """A file and its strength; ValueError for what is no such pair."""
    path, strength = lora if isinstance(lora, Sequence) and len(lora) == 2 else (lora, None)
    if isinstance(path, (str, Path)) and isinstance(strength, (int, float)):
        return path, float(strength)
    raise ValueError(f"set_lora takes a list of (file, strength), such as [('style.safetensors', 0.8)], not {lora!r}")


def _check_weights(transformer: Model) -> None:
    """Raise ValueError for a model whose weights cannot be changed in place."""
    kind = type(transformer).__name__
    refuse_peft(transformer)
    for name, weight in transformer.named_parameters():
        stored = str(weight.dtype).removeprefix("torch.")
        if not weight.is_floating_point() or weight.itemsize < 2 or type(weight.data) is not Tensor or weight.is_meta:
            where = "on the meta device" if weight.is_meta else f"stored as {stored}"
            raise ValueError(
                f"{name} of this {kind} is {where}; set_lora changes weights in bfloat16, float16 or float32 that are "
                "in memory. In ComfyUI, and with generate --lora, it stands beside quantized weights"
            )
