"""ComfyUI's side of the model families: one file each, found here by the backend's name of the family."""

from __future__ import annotations

from ...parallel_backend.loading.checkpoint import Checkpoint
from .base import ComfyFamily, Shapes
from .flux2 import Flux2
from .qwen_image import QwenImage
from .wan import Wan
from .z_image import ZImage

COMFY_FAMILIES: dict[str, ComfyFamily] = {family.name: family for family in (Flux2(), QwenImage(), ZImage(), Wan())}


def family_of(source: Checkpoint) -> ComfyFamily:
    """ComfyUI's side of a checkpoint's family."""
    return COMFY_FAMILIES[source.family.name]


__all__ = ["COMFY_FAMILIES", "ComfyFamily", "Shapes", "family_of"]
