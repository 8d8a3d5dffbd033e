"""Qwen-Image and Qwen-Image-Edit (Alibaba): their transformer with Qwen2.5-VL as text encoder, and their VAE."""

from __future__ import annotations

from ..family import Family, ReferenceModel
from ..text_encoders.qwen25_vl import Qwen25VL
from ..vaes.wan import QwenImageVAE
from .drawing import DRAWINGS
from .transformer import QwenImageTransformer

QWEN_IMAGE = Family(
    name="qwen_image",
    models=("Qwen-Image", "Qwen-Image-2512", "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511"),
    transformer=QwenImageTransformer(),
    text_encoder=Qwen25VL(),
    vae=QwenImageVAE(),
    drawings=DRAWINGS,
    reference_model=ReferenceModel(
        "Qwen-Image",
        {},
        # Qwen2.5-VL-7B; the vision tower is there for images only.
        {
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            }
        },
        fp8_files=("qwen_image_fp8_e4m3fn.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
        fp8_bytes=20_430_000_000,
    ),
)
