"""A tiny FLUX.2 pipeline folder with random weights, for the tests: all weights matter, and none has to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import nn

from parallel_backend.drawing.demo_model import (
    DemoSize,
    assemble_pipeline,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)

# Random keys are all alike to a random query, so a few prompt words would drown in the 500 padding tokens of FLUX.2's
# text. Sharper attention (the weight of the q and k norms) lets them be heard; at twice this the model becomes chaotic.
ATTENTION_SHARPNESS = 2.0

# What people ask for; together with the system message it decides which words are one token.
CORPUS = """\
a red circle on a blue square, a green triangle, a yellow ring, a white background
a photo of a cat sitting on a wooden table, a dog running on the beach, a horse in a field, a bird in the sky
a portrait of an old man with a long beard, a young woman with red hair, a child with a balloon, smiling
a castle on a hill at sunset, a mountain lake in the morning, a forest in the fog, a city street at night in the rain
a bowl of fruit, a cup of coffee, a glass of water, a vase of flowers, soft light, studio lighting, shallow depth
an astronaut riding a horse on the moon, a robot painting a picture, a dragon flying over the sea, a ship in a storm
oil painting, watercolor, pencil drawing, digital art, 3d render, pixel art, cinematic, highly detailed, 35mm film
make the sky orange, replace the cat with a fox, add snow to the picture, remove the person, change the style to anime
a sign that says hello world, the text in bold letters, low quality, blurry, bad anatomy, watermark, over exposed
the of to in on at with and from by for over under between behind next front left right top bottom small large big tiny
"""

SIZE = DemoSize(
    heads=8, head_dim=16, axes_dims_rope=(4, 4, 4, 4), double_blocks=2, single_blocks=3,
    text_hidden=64, text_heads=8, text_kv_heads=2, text_head_dim=16, text_layers=5, text_intermediate=128,
    text_out_layers=(1, 2, 4),
    vae_channels=(8, 8, 16, 16), vae_norm_groups=4, vae_layers_per_block=1, dtype=torch.float32,
)  # fmt: skip


def make_tiny_pipeline(folder: Path) -> Path:
    """Write a pipeline in float32 that ``diffusers.Flux2Pipeline.from_pretrained`` loads; returns ``folder``."""
    tokenizer = _build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = assemble_pipeline(
            tokenizer,
            transformer=_build_transformer(),
            text_encoder=_build_text_encoder(tokenizer),
            vae=_build_vae(),
            dtype=SIZE.dtype,
        )
    pipeline.save_pretrained(folder)
    return folder


def _build_tokenizer() -> Any:
    # Each word also at the start of a text, where it has no leading space.
    words = sorted(set(CORPUS.replace(",", " ").split()))
    return new_tokenizer([SYSTEM_MESSAGE] * 4 + CORPUS.splitlines() * 2 + words, vocab_size=2048)


def _build_transformer() -> nn.Module:
    model = new_transformer(SIZE)
    init_unit_variance(model)
    sharpen_attention(model)
    return model.eval()


def _build_text_encoder(tokenizer: Any) -> nn.Module:
    model = new_text_encoder(SIZE, tokenizer)
    init_unit_variance(model)
    return model.eval()


def _build_vae() -> nn.Module:
    model = new_vae(SIZE)
    init_unit_variance(model)
    model.eval()
    with torch.no_grad():
        # The encoder gives latents of unit variance for a soft picture, the decoder a picture that uses, and does not
        # leave, the range -1..1 for latents of unit variance.
        coarse = torch.randn(2, 3, 6, 6)
        picture = nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic").mul(0.5).clamp(-1, 1)
        _standardize_output(model.quant_conv, model.encoder(picture), slice(0, 32), 1.0)
        _standardize_output(model.decoder.conv_out, _input_of(model.decoder.conv_out, model, 12), slice(None), 0.45)
    return model


def _input_of(module: nn.Module, vae: Any, latent_size: int) -> torch.Tensor:
    """What ``module`` of the decoder gets while a random latent of ``latent_size`` squared is decoded."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vae.decode(torch.randn(2, 32, latent_size, latent_size))
    handle.remove()
    return seen[0]


def _standardize_output(conv: Any, inputs: torch.Tensor, channels: slice, std: float) -> None:
    """Give the output ``channels`` of ``conv`` mean 0 and standard deviation ``std`` over ``inputs`` [B, C, H, W]."""
    out = conv(inputs)[:, channels]
    scale = std / out.std(dim=(0, 2, 3)).clamp_min(1e-6)
    conv.bias[channels] = (conv.bias[channels] - out.mean(dim=(0, 2, 3))) * scale
    conv.weight[channels] *= scale.view(-1, 1, 1, 1)


def init_unit_variance(model: nn.Module) -> None:
    """Draw all weights so that unit variance in gives unit variance out of every linear and convolution."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)


def sharpen_attention(transformer: nn.Module) -> None:
    """Give the q and k norms of all attention modules the weight that lets few words be heard among many."""
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                module.weight.fill_(ATTENTION_SHARPNESS)
