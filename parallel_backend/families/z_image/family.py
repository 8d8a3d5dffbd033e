"""Z-Image and Z-Image-Turbo (Alibaba): the transformer; Qwen3 and FLUX.1's VAE, which they run with, stay ComfyUI's."""

from __future__ import annotations

from ..family import Family, ReferenceModel
from .transformer import ZImageTransformer

Z_IMAGE = Family(
    name="z_image",
    models=("Z-Image-Turbo", "Z-Image"),
    transformer=ZImageTransformer(),
    reference_model=ReferenceModel("Z-Image-Turbo", {}, text_tokens=256),
    pipelines_of_others=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageOmniPipeline"),
)
