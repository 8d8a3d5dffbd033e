"""ComfyUI's own Z-Image from a small file; its detection knows the real width only."""

from __future__ import annotations

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder

from .stock_model import StockLoader, stock_model

TIME, TIME_HIDDEN = 256, 1024
WIDE = (torch.bfloat16, torch.float16)


def load_z_image(path: str) -> comfy.model_patcher.ModelPatcher:
    """A stock MODEL (float32) of a file in bf16, fp16 or fp32, with linears that may be quantized."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    weights = {name: tensor.float() if tensor.dtype in WIDE else tensor for name, tensor in weights.items()}
    dim, context = weights["cap_embedder.1.weight"].shape
    (head,) = weights["layers.0.attention.q_norm.weight"].shape
    unet_config = {
        # As detection says for a width of 3840.
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True, "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
        # Of this file.
        "dim": dim, "cap_feat_dim": context, "n_heads": dim // head, "n_kv_heads": dim // head,
        "axes_dims": [head // 4, 3 * head // 8, 3 * head // 8],
        "n_layers": len({name.split(".")[1] for name in weights if name.startswith("layers.")}),
    }  # fmt: skip

    def widen(model: comfy.model_base.BaseModel) -> None:
        # ComfyUI makes it as wide as the model where that is narrower than 1024; diffusers' always has 1024.
        model.diffusion_model.t_embedder = TimestepEmbedder(TIME_HIDDEN, output_size=TIME, operations=torch.nn)

    return stock_model(comfy.supported_models.ZImage(unet_config), weights, widen)


class ReferenceZImage(StockLoader):
    read = staticmethod(load_z_image)
