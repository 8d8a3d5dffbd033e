"""Nodes that look into a MODEL, a CLIP or a VAE, or change it, as node packs do: with a line of Python."""

from __future__ import annotations

import copy
import types
from typing import Any
from unittest.mock import MagicMock

import comfy.controlnet
import comfy.ldm.flux.model
import comfy.ldm.models.autoencoder
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.vae
import comfy.model_base
import comfy.sd
import comfy.text_encoders.qwen_image
import comfy.utils
import folder_paths
import torch


class _AnyType(str):
    """A type that goes with each other one."""

    def __ne__(self, other: object) -> bool:
        return False


def _names(model: Any) -> dict[str, Any]:
    inside = getattr(getattr(model, "model", None), "diffusion_model", None)
    inside = getattr(model, "cond_stage_model", getattr(model, "first_stage_model", inside))
    return {"m": model, "dm": inside, "comfy": comfy, "copy": copy, "torch": torch, "types": types}


class ReferenceLook:
    """The value of an expression as text, of a MODEL (CLIP, VAE) ``m`` and ``dm``, the model that is in it."""

    RETURN_TYPES = ()
    FUNCTION = "look"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (_AnyType("*"),), "expression": ("STRING", {})}}

    def look(self, model: Any, expression: str) -> dict[str, Any]:
        return {"ui": {"text": [repr(eval(expression, _names(model)))]}}


class ReferenceChange:
    """A clone of a MODEL or a CLIP, or a VAE itself, with which statements do something."""

    RETURN_TYPES = (_AnyType("*"),)
    FUNCTION = "change"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (_AnyType("*"),), "statements": ("STRING", {})}}

    def change(self, model: Any, statements: str) -> tuple[Any]:
        names = _names(model.clone() if hasattr(model, "clone") else model)
        exec(statements, names)
        return (names["m"],)


class _Control(comfy.controlnet.ControlBase):
    def get_control(self, x_noisy: Any, *_: Any, **__: Any) -> dict[str, list[Any]]:
        return {"input": [torch.zeros(1)], "output": []}

    def copy(self) -> _Control:
        copied = _Control()
        self.copy_to(copied)
        return copied


class ReferenceControl:
    """A ControlNet that adds nothing."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        return (_Control(),)


class ReferenceStandIn:
    """Stands for a model of another kind (a CLIP Vision, a patch), which answers everything with more of itself."""

    RETURN_TYPES = (_AnyType("*"),)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def make(self) -> tuple[Any]:
        return (MagicMock(),)


class ReferenceLoraModel:
    """A LoRA file as what a node that trains one gives."""

    RETURN_TYPES = ("LORA_MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {})}}

    def load(self, name: str) -> tuple[dict[str, torch.Tensor]]:
        return (comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True),)
