"""Z-Image in ComfyUI: the transformer in the workers, with ComfyUI's own CLIP and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.supported_models
import comfy.utils
from torch import Tensor

from ...parallel_backend.families import Conditioning
from ...parallel_backend.loading.checkpoint import Checkpoint
from .base import ComfyFamily, Shapes, shapes_by_table


class ZImage(ComfyFamily):
    """See `ComfyFamily`."""

    name = "z_image"
    supported_class = comfy.supported_models.ZImage
    forward_arguments = ("num_tokens", "attention_mask", "transformer_options")
    patch_size = 2
    empty_latent = "EmptySD3LatentImage"

    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": config["in_channels"],
            "dim": config["dim"],
            "cap_feat_dim": config["cap_feat_dim"],
            "n_layers": config["n_layers"],
            "n_refiner_layers": config["n_refiner_layers"],
            "n_heads": config["n_heads"],
            "n_kv_heads": config["n_kv_heads"],
            "qk_norm": True,
            "axes_dims": list(config["axes_dims"]),
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        }

    def weight_shapes(self, source: Checkpoint, unet_config: dict[str, Any]) -> Shapes:
        return shapes_by_table(comfy.utils.z_image_to_diffusers(unet_config), source)

    def block_count(self, config: Mapping[str, Any]) -> int:
        return config["n_layers"]

    def conditioning(
        self, x: Tensor, context: Tensor, given: dict[str, Any], config: Mapping[str, Any]
    ) -> Conditioning:
        # ComfyUI's own model looks at neither: all tokens of the context count.
        given.pop("num_tokens", None)
        given.pop("attention_mask", None)
        given.pop("clip_text_pooled", None)  # of NewBie, which has weights for it
        for name in ("ref_latents", "ref_contexts", "siglip_feats"):
            if given.pop(name, None):
                raise ValueError(
                    f"the conditioning has {name}, for Z-Image-Omni, which is not supported; bypass the node that adds "
                    "reference images"
                )
        return Conditioning(context)
