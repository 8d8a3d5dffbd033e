"""What an evaluation is conditioned on: what a graph gives to the transformer, and an image to a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What an evaluation is conditioned on, as ComfyUI has it.

    Args:
        context: ``[B, L, C]`` from the text encoder.
        references: reference latents, ``[1 or B, C, ...]`` each.
        tensors: what else there is, on any device, by the names that the family gives in
            `Transformer.conditioning_tensors`, such as ``guidance [B]`` or the context's ``mask [B, L]`` (0: no token).
        options: choices, by the names that the family gives in `Transformer.conditioning_options`.
    """

    context: Tensor
    references: Sequence[Tensor] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionImage:
    """An image as a vision tower takes it: flattened patches ``[N, features]``, and how many in time, rows, columns."""

    patches: Tensor
    grid: tuple[int, int, int]
