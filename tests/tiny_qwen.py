"""Tiny Qwen-Image pipeline folders with random weights, for the tests: all weights matter, none has to be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError:  # transformers 5.0, where the one that needs no torchvision has the plain name
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

from .tiny_pipeline import CORPUS, init_unit_variance, sharpen_attention

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PIPELINES = {kind.__name__: kind for kind in (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)}
HEADS, HEAD_DIM = 8, 32
TEXT_HEADS, TEXT_KV_HEADS, TEXT_HEAD_DIM = 8, 2, 16
SCHEDULER = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9,
    "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}  # fmt: skip
"""As in Qwen-Image's own folder."""


def make_tiny_qwen(folder: Path, kind: str = "QwenImagePipeline") -> Path:
    """Write a pipeline in float32 that diffusers' class of that name loads; returns ``folder``.

    Edit pipelines come with the image part of their processor.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "transformer": tiny_transformer(zero_cond_t=kind == "QwenImageEditPlusPipeline"),
            "text_encoder": tiny_text_encoder(len(tokenizer), tokenizer.convert_tokens_to_ids),
            "vae": tiny_vae(),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    others = {} if kind == "QwenImagePipeline" else {"processor": None}
    PIPELINES[kind](scheduler=scheduler, tokenizer=tokenizer, **models, **others).save_pretrained(folder)
    if others:
        # The whole processor, with its part for videos, needs torchvision; for images this is all of it.
        Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
        tokenizer.save_pretrained(folder / "processor")
        index = json.loads((folder / "model_index.json").read_text())
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def tiny_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """3 blocks of 8 heads x 32, for contexts of the tiny text encoder."""
    config = {
        "num_layers": 3,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_HEADS * TEXT_HEAD_DIM,
        "axes_dims_rope": (4, 14, 14),
    }
    model = QwenImageTransformer2DModel(**{**config, **changes})
    init_unit_variance(model)
    sharpen_attention(model)
    return model.eval()


def tiny_text_encoder(vocab: int, token_id: Any) -> Qwen2_5_VLForConditionalGeneration:
    """3 layers of 8 query and 2 kv heads x 16, and a vision tower of 2 blocks; ``token_id`` is of a special token."""
    width = TEXT_HEADS * TEXT_HEAD_DIM
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": TEXT_HEADS,
            "num_key_value_heads": TEXT_KV_HEADS,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    init_unit_variance(model)
    return model.eval()


def tiny_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's VAE with a sixth of its channels, decoding to pictures within -1..1."""
    model = AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1)
    init_unit_variance(model)
    with torch.no_grad():
        latent = torch.randn(2, 16, 1, 12, 12)
        model.decoder.conv_out.weight.mul_(0.4 / model.decode(latent).sample.std())
        picture = torch.nn.functional.interpolate(torch.randn(2, 3, 6, 6), size=(96, 96), mode="bicubic").mul(0.5)
        moments = model.encode(picture.clamp(-1, 1).unsqueeze(2)).latent_dist
        scale = torch.tensor(model.config.latents_std).mean() / moments.mean.std()
        model.quant_conv.weight[:16] *= scale
    return model.eval()


def tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen's special tokens, learnt from a few sentences and a template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = "Describe the image by detailing the color, shape, size, texture, quantity, text, objects and background\n"
    learner.train_from_iterator([*CORPUS.splitlines(), *[texts] * 4, "system\nuser\nassistant\n"], trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


def single_file_tensors(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """What ComfyUI's file of a transformer holds: diffusers' names, and the mark of models with references at zero."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.zero_cond_t:  # type: ignore[union-attr]
        tensors["__index_timestep_zero__"] = torch.empty(0)
    return tensors
