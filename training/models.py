"""The models of the demo pipeline before training: FLUX.2's classes in small, made to learn well from scratch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn
from transformers import Mistral3ForConditionalGeneration

from parallel_backend.drawing.demo_model import (
    DEMO_SIZE,
    assemble_pipeline,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)

from .scenes import corpus

SIZE = replace(
    DEMO_SIZE,
    vae_channels=(16, 32, 48, 64),
    axes_dims_rope=(4, 8, 8, 4),  # 24 tokens of height and width need finer steps than text and time
    text_rope_theta=1e4,
)
PREVIEW: dict[int, tuple[float, float, float]] = {
    1: (0.050, 0.044, 0.084),
    2: (-0.010, 0.010, 0.064),
    3: (0.214, 0.301, 0.365),
    6: (-0.040, 0.090, -0.024),
    8: (-0.353, -0.271, -0.167),
    11: (0.075, 0.009, -0.094),
    15: (-0.094, -0.001, 0.019),
    19: (0.121, -0.003, 0.006),
    24: (-0.046, -0.020, -0.031),
    28: (-0.033, -0.046, -0.047),
    29: (-0.009, 0.039, 0.061),
    31: (-0.011, -0.046, -0.061),
}
"""How much red, green and blue ComfyUI's previews of FLUX.2's latents show for the channels in use."""

CHANNELS = tuple(PREVIEW)
"""The latent channels in use of FLUX.2's 32; the VAE leaves the others empty. Flat shapes need no more than 12, and a
transformer of width 192 that does not have to carry the noise of 128 channels from its input to its output has room to
think. Previews look most at these 12, so the others' noise hardly shows in them."""

USED = tuple(4 * channel + part for channel in CHANNELS for part in range(4))
"""The same channels among the 128 of a patchified latent."""

TEXT_LENGTH = 512
PREFIX = f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]"


def build_tokenizer() -> Any:
    """Every word of the captions is one token, and any text has tokens."""
    return new_tokenizer([SYSTEM_MESSAGE] * 500 + corpus(), vocab_size=1024)


def build_transformer() -> Flux2Transformer2DModel:
    model = new_transformer(SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
            # Blocks that begin as the identity, as in DiT.
            if "modulation" in name or name.startswith(("norm_out", "proj_out")):
                parameter.zero_()
        # Channels that are always empty are not looked at, so what noise they hold does no harm.
        model.x_embedder.weight[:, _unused(USED, 128)] = 0
    return model


def build_text_encoder(tokenizer: Any) -> Mistral3ForConditionalGeneration:
    model = new_text_encoder(SIZE, tokenizer)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.5 if "embed" in name else parameter.shape[1] ** -0.5)
        # Pads are zero and stay zero through every block (no biases, and a pad only sees pads), so diffusers' padded
        # prompts and ComfyUI's, which pads with zeros after encoding, are the same to the transformer.
        model.model.language_model.embed_tokens.weight[tokenizer.pad_token_id] = 0
    return model


def build_vae() -> AutoencoderKLFlux2:
    return new_vae(SIZE)


def empty_unused_channels(vae: AutoencoderKLFlux2) -> None:
    """Make the latent's channels outside `CHANNELS` always zero; to be called after each step of training."""
    unused = _unused(CHANNELS, 32)
    with torch.no_grad():
        vae.quant_conv.weight[unused] = 0
        vae.quant_conv.bias[unused] = 0
        vae.post_quant_conv.weight[:, unused] = 0


def _unused(used: Sequence[int], count: int) -> list[int]:
    return [channel for channel in range(count) if channel not in used]


def with_all_channels(used: Tensor, dim: int, indices: Sequence[int], count: int) -> Tensor:
    """``used`` along ``dim`` at ``indices`` of ``count`` channels, zeros at the others."""
    shape = list(used.shape)
    shape[dim] = count
    return used.new_zeros(shape).index_copy(dim, on_device(tuple(indices), used.device), used)


@functools.cache
def on_device(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since a CUDA graph cannot be captured while numbers are copied to the device."""
    return torch.tensor(indices, device=device)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of whole conversations, without padding. A test holds this and the chat template together."""
    backend = tokenizer._tokenizer
    # A call of the tokenizer with padding leaves it on.
    backend.no_padding()
    backend.no_truncation()
    return [e.ids for e in backend.encode_batch([f"{PREFIX}{text}[/INST]" for text in prompts])]


def encode_text(text_encoder: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """Contexts ``[B, T, 3 * hidden]`` of ``ids [B, T]``, which are padded on the right; these on the left, with zeros.

    The model is causal: what follows a token does not change it, so no mask is needed.
    """
    model = text_encoder.model.language_model
    states = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = model.rotary_emb(states, position_ids=positions)
    kept = []
    for index in range(1, 1 + max(SIZE.text_out_layers)):
        states = model.layers[index - 1](
            states, attention_mask=None, position_ids=positions, position_embeddings=rotary
        )
        if index in SIZE.text_out_layers:
            kept.append(states)
    context = torch.cat(kept, dim=-1)
    source = positions - (ids.shape[1] - lengths[:, None])
    context = context.gather(1, source.clamp_min(0)[..., None].expand(-1, -1, context.shape[-1]))
    return context * (source >= 0)[..., None]


@torch.no_grad()
def encode_padded(text_encoder: Any, ids: Tensor, lengths: Tensor) -> Tensor:
    """What diffusers' pipeline gets: prompts padded on the left to 512 and masked, ``[B, 512, 3 * hidden]``.

    A pad's row of the mask is empty. CPUs make zeros of that, and some CUDA kernels an average over all tokens.
    """
    positions = torch.arange(TEXT_LENGTH, device=ids.device)[None] - (TEXT_LENGTH - lengths[:, None])
    mask = positions >= 0
    padded = ids.gather(1, positions.clamp(0, ids.shape[1] - 1)) * mask  # the id of <pad> is 0
    states = text_encoder.model.language_model(
        input_ids=padded, attention_mask=mask.long(), output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.cat([states[layer] for layer in SIZE.text_out_layers], dim=-1)


def text_ids(length: int, device: Any) -> Tensor:
    """Coordinates of a context that ends where FLUX.2's 512 tokens end."""
    ids = torch.zeros(length, 4, device=device)
    ids[:, 3] = torch.arange(TEXT_LENGTH - length, TEXT_LENGTH, device=device)
    return ids


def image_ids(height: int, width: int, time: int, device: Any) -> Tensor:
    ids = torch.zeros(height, width, 4, device=device)
    ids[..., 0] = time
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)
    return ids.flatten(0, 1)


def save_pipeline(folder: Path, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any) -> None:
    """Write a folder in bfloat16 that ``Flux2Pipeline.from_pretrained`` loads."""
    for model in (text_encoder, vae, transformer):
        model.eval()
    pipeline = assemble_pipeline(
        tokenizer, transformer=transformer, text_encoder=text_encoder, vae=vae, dtype=torch.bfloat16
    )
    # In files small enough for any hosting.
    pipeline.save_pretrained(folder, max_shard_size="14MB")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
