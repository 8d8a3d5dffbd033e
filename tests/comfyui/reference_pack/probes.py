"""Nodes that look into a MODEL, or change it, as node packs do: with a line of Python."""

from __future__ import annotations

import copy
import types
from typing import Any
from unittest.mock import MagicMock

import comfy.controlnet
import comfy.ldm.flux.model
import comfy.ldm.qwen_image.model
import comfy.model_base
import comfy.utils
import folder_paths
import torch


def _names(model: Any) -> dict[str, Any]:
    inside = getattr(getattr(model, "model", None), "diffusion_model", None)
    return {"m": model, "dm": inside, "comfy": comfy, "copy": copy, "torch": torch, "types": types}


class ReferenceLook:
    """The value of an expression, of a MODEL ``m`` and its diffusion model ``dm``, as text."""

    RETURN_TYPES = ()
    FUNCTION = "look"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "expression": ("STRING", {})}}

    def look(self, model: Any, expression: str) -> dict[str, Any]:
        return {"ui": {"text": [repr(eval(expression, _names(model)))]}}


class ReferenceChange:
    """A clone of a MODEL, with which statements do something."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "change"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "statements": ("STRING", {})}}

    def change(self, model: Any, statements: str) -> tuple[Any]:
        names = _names(model.clone())
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


class _AnyType(str):
    """An output type that each input takes."""

    def __ne__(self, other: object) -> bool:
        return False


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
