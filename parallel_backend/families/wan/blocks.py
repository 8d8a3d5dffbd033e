"""Wan's block on a rank, over a shard of the sequence; its cross-attention exchanges nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.double_stream import Kept, clipped, mlp_output, row_output, table_of
from ...blocks.embedding import Rotary
from ...blocks.forwards import BlockForwards
from ...blocks.kept_keys import BlockKeys, Keys
from ...config import Speed
from ...parallel import kernels
from ...parallel.attention import Lengths, ShardedAttention
from ...parallel.elementwise import HeadInputs, Table, gated_add, gated_add_and_norm, gelu, modulated_norm
from ...parallel.tensor import Model
from ...parallel.whole_norm import begin_sums, factors

Modulation = tuple[Tensor, Tensor | None]
"""``[n * B, 6, C]`` of the timesteps, and which of the n a token takes (`Table`)."""


def install(transformer: Model, attention: ShardedAttention, speed: Speed) -> BlockForwards:
    """Give all blocks of a transformer forwards for a rank."""
    blocks = transformer.blocks
    forwards = BlockForwards(attention, speed, (blocks,))
    forwards.replace(blocks, 1, _block, _forward)
    return forwards


def _forward(
    run: Any,
    block: Model,
    hidden_states: Tensor,
    encoder_hidden_states: BlockKeys,
    temb: Modulation,
    rotary_emb: Rotary,
) -> Tensor:
    tp = run.attention.tp
    keys = encoder_hidden_states.of(block, lambda block, text, image: _keys(block.attn2, text, image, tp))
    return run(block, hidden_states, *temb, *rotary_emb, *keys)


def _keys(attn: Model, text: Tensor, image: Tensor | None, tp: Any) -> Keys:
    """Keys and values ``[B, L, H_local, D]`` of the text, and of the image where the model has weights for it.

    A query's norm is over all heads: its weight moves to the keys, so that of each query one factor is left.
    """

    def heads(to_key: Model, to_value: Model, norm: Model, tokens: Tensor) -> tuple[Tensor, Tensor]:
        key = to_key(tokens)
        sums = begin_sums(tp, key)
        value = to_value(tokens)
        key = key.float() * factors(sums, attn.inner_dim, norm.eps) * norm.weight.float() * attn.norm_q.weight.float()
        dim = attn.inner_dim // attn.heads
        return key.to(tokens.dtype).unflatten(2, (-1, dim)), value.unflatten(2, (-1, dim))

    found = heads(attn.to_k, attn.to_v, attn.norm_k, text)
    if attn.add_k_proj is None:
        return (*found, None, None)
    # As ComfyUI: without an image these weights, too, are for the text.
    return *found, *heads(attn.add_k_proj, attn.add_v_proj, attn.norm_added_k, text if image is None else image)


def _block(
    block: Model,
    attention: ShardedAttention,
    x: Tensor,  # [B, S_local, C]
    modulation: Tensor,  # [n * B, 6, C]
    picks: Tensor | None,  # [B, S_local], which of the n
    cos: Tensor,
    sin: Tensor,
    key: Tensor,  # [B, L, H_local, D] of the text
    value: Tensor,
    image_key: Tensor | None,
    image_value: Tensor | None,
    lengths: Lengths,
    kept: Kept,
) -> Tensor:
    width, eps = x.shape[-1], block.norm1.eps
    rows = (block.scale_shift_table.float() + modulation.float()).flatten(1)
    around_self, around_mlp = table_of(rows, 0, width, picks), table_of(rows, 3 * width, width, picks)
    # The norm before cross-attention has weights and no modulation, and nothing scales what is added after it.
    beside = (block.norm2.bias.float(), block.norm2.weight.float() - 1, rows.new_ones(width))
    shift, scale, gate = (values.expand(rows.shape[0], -1) for values in beside)
    around_cross = Table(shift, scale, gate, picks)

    attn = block.attn1
    normed = modulated_norm(x, around_self, eps)
    queries, keys = attn.to_q(normed), attn.to_k(normed)
    sums = begin_sums(attention.tp, queries, keys)
    values = attn.to_v(normed)  # under which they travel
    streams = [HeadInputs(queries, keys, values, attn.norm_q.weight, attn.norm_k.weight, attn.norm_q.eps)]
    packed = attention.pack(streams, cos, sin, factors(sums, attn.inner_dim, attn.norm_q.eps))
    begun = [attention.begin(packed, lengths)]
    del packed, normed, queries, keys, values, streams
    out = attention.collect(attention.attend(begun.pop(), lengths, kept))
    x, normed = gated_add_and_norm(x, around_self, row_output(attn.to_out[0], out, True), around_cross, eps)
    del out

    attn = block.attn2
    query = attn.to_q(normed)
    query.mul_(factors(begin_sums(attention.tp, query), attn.inner_dim, attn.norm_q.eps))
    query = query.unflatten(2, (-1, key.shape[-1]))
    out = _attend(query, key, value)
    if image_key is not None and image_value is not None:
        out = out + _attend(query, image_key, image_value)
    del query
    x, normed = gated_add_and_norm(x, around_cross, row_output(attn.to_out[0], out.flatten(2), True), around_mlp, eps)
    del out

    pieces = mlp_output(block.ffn.net[0].proj, block.ffn.net[2], gelu, normed)
    return clipped(gated_add(x, around_mlp, pieces))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A rank's queries over all keys; it may have none."""
    return kernels.attention(query, key, value) if query.shape[1] else torch.zeros_like(query)
