"""What a model embeds anew in each forward: the timestep, from exact values, and positions, which are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parallel.tensor import Model

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines ``[S, D]`` of tokens, in fp32."""
KEPT = 8
"""Rotary embeddings that are kept: those of two prompts and a few sizes."""


class ExactTime:
    """A model's embedder of timestep and guidance, which has them as the caller gave them.

    diffusers' transformers round both to the dtype of the weights before they scale and embed them: a guidance of 3.5
    becomes 3504 thousandths in bf16. ComfyUI embeds the values as they are.

    Args:
        module: the embedder; its forward is replaced on the instance.
        embed: ``(module, timestep, guidance, <the arguments of the module's own forward>)``.
    """

    def __init__(self, module: Model, embed: Callable[..., Tensor]) -> None:
        self.module = module
        self.timestep: Tensor | None = None
        self.guidance: Tensor | None = None

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return embed(module, self.timestep, self.guidance, *args, **kwargs)

        module.forward = forward

    def begin(self, arguments: dict[str, Any]) -> None:
        """A forward with these arguments begins; fp32 or wider values stay as they are."""
        self.timestep, self.guidance = arguments["timestep"], arguments.get("guidance")

    def remove(self) -> None:
        """Give the embedder its own forward back."""
        del self.module.forward


class KeptRotary:
    """A model's embedder of positions, which remembers what it made of tensors of ids that come again in each step.

    Args:
        module: the embedder; its forward is replaced on the instance.
    """

    def __init__(self, module: Model) -> None:
        self.module = module
        self._sources: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self._kept: OrderedDict[tuple[int, ...], tuple[Tensor, Any]] = OrderedDict()
        module.forward = self._forward

    def begin(self, whole: Tensor, local: Tensor, place: tuple[int, ...]) -> None:
        """Ids of a stream in the forward that begins.

        Args:
            whole: as the caller gave them.
            local: those of this rank's tokens.
            place: where these are in the whole.
        """
        # The tensor is held as long as what was made of it is, so that no other gets its identity.
        version = 0 if whole.is_inference() else whole._version
        self._sources[local.data_ptr()] = (whole, (id(whole), version, *place))

    def end(self) -> None:
        """The forward has ended."""
        self._sources.clear()

    def _forward(self, ids: Tensor) -> Any:
        whole, key = self._sources.get(ids.data_ptr(), (None, None))
        if whole is None or key is None or not ids.numel():
            return type(self.module).forward(self.module, ids)
        if key not in self._kept:
            self._kept[key] = (whole, type(self.module).forward(self.module, ids))
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key][1]

    def remove(self) -> None:
        """Give the embedder its own forward back."""
        del self.module.forward


def rotary_of(positions: Tensor, dims: Sequence[int], theta: float) -> Rotary:
    """Cosines and sines ``[S, D]`` in fp32 of positions ``[S, axes]``, neighbours alike; made in fp64 as in diffusers.

    Args:
        positions: any, where models may have tables that end at some.
        dims: features of a head for each of the axes; they add up to D.
        theta: base of the frequencies.
    """
    angles = []
    for axis, dim in enumerate(dims):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(torch.outer(positions[:, axis].double(), frequencies).float())
    pairs = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return pairs.cos(), pairs.sin()
