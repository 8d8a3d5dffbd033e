"""Small random Z-Image transformers in one file, under the names that ComfyUI's users have them by."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

CONTEXT = 64
"""Features of a token of the text, as many as a hidden state of `qwen3_file.qwen3_tensors` has."""
_NAMES = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    "attention.to_out.0": "attention.out",
}
"""Parts of diffusers' names -> of ComfyUI's."""


def z_image_model(**changes: Any) -> ZImageTransformer2DModel:
    """6 heads of 48 and 2 + 2 + 2 blocks: the narrowest whose MLP, and timesteps, ComfyUI's own class makes as wide."""
    sizes = {
        "dim": 288,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 6,
        "cap_feat_dim": CONTEXT,
        "axes_dims": [12, 18, 18],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(**{**sizes, **changes}).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif name.endswith("pad_token"):
                    parameter.normal_()
    return model


def z_image_tensors(model: ZImageTransformer2DModel) -> dict[str, Tensor]:
    """A model's weights under ComfyUI's names, queries, keys and values in one tensor."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        name, is_part = re.subn(r"\.to_[qkv]\.", ".qkv.", name)
        tensors[name] = torch.cat([tensors[name], tensor]) if is_part and name in tensors else tensor
    return tensors
