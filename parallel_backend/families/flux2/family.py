"""FLUX.2 (Black Forest Labs): dev with Mistral 3 as text encoder, and klein, whose Qwen3 stays ComfyUI's; its VAE."""

from __future__ import annotations

from ..family import Family, ReferenceModel
from ..text_encoders.mistral3 import Mistral3
from ..vaes.flux2 import Flux2VAE
from .drawing import Flux2Drawing
from .transformer import Flux2Transformer

KLEIN = tuple(f"FLUX.2-klein-{kind}" for kind in ("4B", "9B", "base-4B", "base-9B"))
FLUX2 = Family(
    name="flux2",
    models=("FLUX.2-dev", *KLEIN),
    transformer_alone=KLEIN,
    pipelines_of_others=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"),
    transformer=Flux2Transformer(),
    text_encoder=Mistral3(),
    vae=Flux2VAE(),
    drawings={"Flux2Pipeline": Flux2Drawing},
    reference_model=ReferenceModel(
        "FLUX.2-dev",
        {},
        # Mistral-Small-3.2-24B. The vision tower and the last ten layers play no part: the workers do not hold them.
        {
            "text_config": {
                "model_type": "mistral",
                "vocab_size": 131072,
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
            }
        },
        fp8_files=("flux2_dev_fp8mixed.safetensors", "mistral_3_small_flux2_fp8.safetensors"),
        fp8_bytes=35_500_000_000,
    ),
)
