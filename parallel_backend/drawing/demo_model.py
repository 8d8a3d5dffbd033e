"""Small FLUX.2 pipelines: where the trained one is, and how new ones are put together.

They stand in for the 100 GB of FLUX.2-dev in the demo, the tests and the example workflows. The layout on disk is the
one of ``black-forest-labs/FLUX.2-dev``, so everything that reads that reads these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEMO_FOLDER_NAME = "flux2-demo"

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")


@dataclass(frozen=True)
class DemoSize:
    """Dimensions of one demo pipeline; all else follows FLUX.2-dev."""

    heads: int
    head_dim: int
    axes_dims_rope: tuple[int, int, int, int]
    double_blocks: int
    single_blocks: int
    text_hidden: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    text_layers: int
    text_intermediate: int
    text_out_layers: tuple[int, int, int]
    vae_channels: tuple[int, int, int, int]
    vae_norm_groups: int
    vae_layers_per_block: int
    dtype: torch.dtype
    text_rope_theta: float = 1e9


DEMO_SIZE = DemoSize(
    heads=8, head_dim=24, axes_dims_rope=(6, 6, 6, 6), double_blocks=3, single_blocks=12,
    text_hidden=128, text_heads=8, text_kv_heads=4, text_head_dim=16, text_layers=6, text_intermediate=256,
    text_out_layers=(1, 3, 5),
    vae_channels=(16, 16, 32, 32), vae_norm_groups=8, vae_layers_per_block=1, dtype=torch.bfloat16,
)  # fmt: skip


def demo_folder() -> Path:
    """The trained demo pipeline, which comes with this package; ``training/`` has its recipe.

    It draws one to three shapes: "a large red circle left of a large blue star on a grey background".
    """
    return Path(__file__).parents[1] / "models" / DEMO_FOLDER_NAME


def demo_loras() -> Path:
    """The folder of LoRAs for the demo pipeline: ``flux2-demo-outline.safetensors`` draws outlines."""
    return demo_folder().with_name("loras")


def assemble_pipeline(
    tokenizer: Any, *, transformer: nn.Module, text_encoder: nn.Module, vae: nn.Module, dtype: torch.dtype
) -> Any:
    """A `Flux2Pipeline` of these models, cast to ``dtype``, with FLUX.2-dev's scheduler."""
    # Imported here: demo_folder() must stay cheap for callers that only look whether the demo is there.
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    from ..families.flux2.drawing import SCHEDULER

    for model in (transformer, text_encoder, vae):
        # Not model.to(): diffusers' override warns about modules to keep in float32 where there are none.
        nn.Module.to(model, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return Flux2Pipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


def new_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer, as Mistral's, learnt from ``texts``, with FLUX.2's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ..families.flux2.drawing import CHAT_TEMPLATE

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token.startswith("[")],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def new_transformer(size: DemoSize) -> Any:
    """The transformer of a size, with the weights that diffusers gives it."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=3 * size.text_hidden,
        mlp_ratio=3.0,
        axes_dims_rope=size.axes_dims_rope,
        rope_theta=2000,
        guidance_embeds=True,
    )


def new_text_encoder(size: DemoSize, tokenizer: Any) -> Any:
    """The text encoder of a size for a tokenizer, with the weights that transformers gives it."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text_config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_hidden,
        intermediate_size=size.text_intermediate,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_kv_heads,
        head_dim=size.text_head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": size.text_rope_theta},
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    config = Mistral3Config(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
        # Not an attribute of Mistral3Config: FLUX.2's pipeline has (10, 20, 30) as a default argument, and a model with
        # fewer layers must say which ones it means.
        text_encoder_out_layers=list(size.text_out_layers),
    )
    return Mistral3ForConditionalGeneration(config)


def new_vae(size: DemoSize) -> Any:
    """The VAE of a size, with the weights that diffusers gives it."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=size.vae_channels,
        layers_per_block=size.vae_layers_per_block,
        latent_channels=32,
        norm_num_groups=size.vae_norm_groups,
        sample_size=1024,
    )
