"""Wan 2.1 and 2.2 (Alibaba), and what has their blocks and nothing more."""

from __future__ import annotations

from ..family import Family, ReferenceModel
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
    reference_model=ReferenceModel(
        "Wan2.2-T2V-A14B",
        {},
        fp8_files=("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",),
        fp8_bytes=14_295_000_000,
        transformers=2,
        width=832,
        height=480,
        frames=81,
    ),
    pipelines_of_others=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline"),
)
