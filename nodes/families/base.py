"""What ComfyUI's side of a model family has to state: the interface that the files in this folder fill in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import comfy.sd
from torch import Tensor

from ...parallel_backend.families import Conditioning
from ...parallel_backend.loading.checkpoint import Checkpoint
from ...parallel_backend.loading.pipeline_folder import PipelineFolder
from ...parallel_backend.loading.text_encoder_file import TextEncoderFile
from ..group import ModelHandle

Shapes = dict[str, tuple[int, ...]]
"""Names of weights as ComfyUI has them, and their shapes."""


def shapes_by_table(table: Mapping[str, Any], source: Checkpoint, renames: Mapping[str, str] | None = None) -> Shapes:
    """The transformer's weights under ComfyUI's names, of which some are several of diffusers', one after the other.

    Args:
        table: diffusers' name -> ComfyUI's; or ComfyUI's, which rows ``(dim, first, count)`` of it, and what else
            there is to say.
        source: its checkpoint.
        renames: parts of diffusers' names that the table lacks -> of ComfyUI's.
    """
    shapes: Shapes = {}
    for name, parameter in source.family.transformer.build(source.transformer_config).named_parameters():
        target = table.get(name)
        if target is None:
            for ours, theirs in (renames or {}).items():
                name = name.replace(ours, theirs)
            target = name
        key, rows = (target, None) if isinstance(target, str) else target[:2]
        height = parameter.shape[0] if rows is None else max(rows[1] + rows[2], shapes.get(key, (0,))[0])
        shapes[key] = (height, *parameter.shape[1:])
    return shapes


class ComfyFamily(ABC):
    """Everything that this side knows about one model family; `parallel_backend.families` has the other side."""

    name: str
    """The backend's name of the family."""

    # The MODEL.

    supported_class: Any
    """ComfyUI's class of its settings, of ``comfy.supported_models``, where that is one for all."""
    forward_arguments: tuple[str, ...]
    """What comes after ``x``, ``timestep`` and ``context`` where ComfyUI's own diffusion model is called by its
    wrappers, in that order: a wrapper finds them by their position."""
    patch_size: Any
    """Of ComfyUI's diffusion model."""
    empty_latent: str
    """The node that makes an empty latent for it."""

    @abstractmethod
    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What ComfyUI's detection would say of the transformer of a configuration."""

    def supported(self, unet_config: dict[str, Any]) -> Any:
        """ComfyUI's settings for what `unet_config` said."""
        return self.supported_class(unet_config)

    @abstractmethod
    def weight_shapes(self, source: Checkpoint, unet_config: dict[str, Any]) -> Shapes:
        """The transformer's weights under ComfyUI's names: what patches may name."""

    @abstractmethod
    def block_count(self, config: Mapping[str, Any]) -> int:
        """Blocks of the transformer of a configuration."""

    @abstractmethod
    def conditioning(
        self, x: Tensor, context: Tensor, given: dict[str, Any], config: Mapping[str, Any]
    ) -> Conditioning:
        """What an evaluation is conditioned on.

        Args:
            x: the latent, of the right number of channels.
            context: ``[B, L, C]``.
            given: all other arguments of ComfyUI's diffusion model but ``control`` and ``transformer_options``, and
                ``concat``, the channels behind the latent's. What is used is taken out; the caller refuses what is
                left.
            config: of the transformer.

        Raises:
            ValueError: the workers would have to ignore something.
        """

    # The CLIP.

    clip_type: str = ""
    """What ComfyUI's Load CLIP calls the family; empty where the text encoder stays ComfyUI's own."""

    def clip_of_file(self, handle: ModelHandle, source: TextEncoderFile) -> comfy.sd.CLIP:
        """The CLIP of a text encoder file that is in the workers; ValueError where its tokenizer is damaged."""
        raise NotImplementedError(f"{self.name} has no text encoder")

    def clip_of_folder(self, handle: ModelHandle, source: PipelineFolder) -> comfy.sd.CLIP:
        """The CLIP of a pipeline folder whose text encoder is in the workers."""
        raise NotImplementedError(f"{self.name} has no text encoder")
