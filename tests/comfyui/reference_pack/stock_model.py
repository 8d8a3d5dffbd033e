"""ComfyUI's own MODEL of a configuration and weights, without its loader, which knows files of the real size only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch


def stock_model(
    config: comfy.supported_models_base.BASE,
    weights: dict[str, torch.Tensor],
    change: Callable[[Any], None] = lambda model: None,
) -> comfy.model_patcher.ModelPatcher:
    """The MODEL in float32.

    Args:
        config: a class of comfy.supported_models, made with the configuration of the model.
        weights: all of them, under ComfyUI's names.
        change: what is done to the model before it gets its weights.
    """
    config.set_inference_dtype(torch.float32, None)
    config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    model = config.get_model(weights, "")
    change(model)
    model.diffusion_model.load_state_dict(weights, strict=True)
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class StockLoader:
    """Takes the place of Load Diffusion Model in a graph, for files of sizes that it does not know."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"
    read: Callable[[str], Any]
    """Makes the MODEL of a file."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"unet_name": ("STRING", {})}, "optional": {"weight_dtype": ("STRING", {})}}

    def load(self, unet_name: str, weight_dtype: str = "default") -> tuple[Any]:
        return (type(self).read(folder_paths.get_full_path_or_raise("diffusion_models", unet_name)),)
