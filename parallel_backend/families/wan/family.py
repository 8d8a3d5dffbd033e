"""Wan 2.1 and 2.2 (Alibaba), and what has their blocks and nothing more."""

from __future__ import annotations

from ..family import Family, ReferenceModel
from ..text_encoders.umt5 import Umt5
from ..vaes.wan import WanVAE
from .transformer import WanTransformer

WAN = Family(
    name="wan",
    models=(
        "Wan2.2-T2V-A14B",
        "Wan2.2-I2V-A14B",
        "Wan2.2-TI2V-5B",
        "Wan2.2-Fun-A14B-Control",
        "Wan2.2-Fun-A14B-InP",
        "Wan2.1-T2V-14B",
        "Wan2.1-T2V-1.3B",
        "Wan2.1-I2V-14B",
        "Wan2.1-FLF2V-14B",
        "Wan2.1-Fun-Control",
        "Wan2.1-Fun-InP",
    ),
    transformer=WanTransformer(),
    text_encoder=Umt5(),
    vae=WanVAE(),
    reference_model=ReferenceModel(
        "Wan2.2-T2V-A14B",
        {},
        # The encoder of umT5-XXL.
        {
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "relative_attention_num_buckets": 32,
            "feed_forward_proj": "gated-gelu",
        },
        fp8_files=("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
        fp8_bytes=14_295_000_000,
        transformers=2,
        width=832,
        height=480,
        frames=81,
    ),
    pipelines_of_others=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline"),
)
