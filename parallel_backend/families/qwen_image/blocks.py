"""Qwen-Image's block on a rank, over a shard of the sequence."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...blocks.double_stream import Kept, double_block, streams_of, table_of
from ...blocks.forwards import BlockForwards, refuse
from ...config import Speed
from ...parallel.attention import Lengths, ShardedAttention
from ...parallel.tensor import Model


def install(transformer: Model, attention: ShardedAttention, speed: Speed) -> BlockForwards:
    """Give all blocks of a transformer forwards for a rank."""
    blocks = transformer.transformer_blocks
    forwards = BlockForwards(attention, speed, (blocks,))
    forwards.replace(blocks, 2, _double, _forward)
    return forwards


def _forward(
    run: Any,
    block: Model,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    refuse(encoder_hidden_states_mask=encoder_hidden_states_mask, **(joint_attention_kwargs or {}))
    # References may be modulated as at timestep 0, whose vectors come after the others'; text never is.
    text_temb = temb[: temb.shape[0] // 2] if block.zero_cond_t else temb
    image_modulation, text_modulation = block.img_mod(temb), block.txt_mod(text_temb)
    return run(
        block,
        hidden_states,
        encoder_hidden_states,
        image_modulation,
        text_modulation,
        modulate_index,
        *image_rotary_emb,
    )


def _double(
    block: Model,
    attention: ShardedAttention,
    image: Tensor,  # [B, S_image_local, C]
    text: Tensor,  # [B, S_text_local, C]
    image_modulation: Tensor,  # [n * B, 6 C]
    text_modulation: Tensor,  # [B, 6 C]
    index: Tensor | None,  # [B, S_image_local], which of the n
    cos: Tensor,
    sin: Tensor,
    lengths: Lengths,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    image_stream, text_stream = streams_of(
        block.attn,
        (block.img_mlp.net[0].proj, block.img_mlp.net[2], block.img_norm1.eps),
        (block.txt_mlp.net[0].proj, block.txt_mlp.net[2], block.txt_norm1.eps),
    )
    (width,) = block.img_norm1.normalized_shape
    image_tables = table_of(image_modulation, 0, width, index), table_of(image_modulation, 3 * width, width, index)
    text_tables = table_of(text_modulation, 0, width), table_of(text_modulation, 3 * width, width)
    return double_block(
        attention,
        image_stream,
        text_stream,
        _gelu,
        image,
        text,
        image_tables,
        text_tables,
        cos,
        sin,
        lengths,
        kept,
    )


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
