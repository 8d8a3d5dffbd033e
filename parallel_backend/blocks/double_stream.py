"""What families' blocks are made of on a rank: their linears, outputs in pieces, and the double-stream block."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..parallel import exchange, long_mlp
from ..parallel.attention import Lengths, ShardedAttention
from ..parallel.elementwise import (
    HeadInputs,
    Pieces,
    Table,
    gated_add,
    gated_add_and_norm,
    gelu,
    modulated_norm,
    swiglu,
)
from ..parallel.long_mlp import Mlp, is_long, mlp_in_pieces, mlp_in_place
from ..parallel.products import product_of
from ..parallel.tensor import Model, RowParallelLinear

Kept = list[list[Tensor]] | None
TILE = 128
"""Tokens that a matrix product works on at a time: pieces are multiples of it."""


class Stream(NamedTuple):
    """The modules of one stream of a double-stream block, and the epsilon of its norms."""

    query: Model
    key: Model
    value: Model
    query_norm: Model
    key_norm: Model
    out: Model
    mlp_in: Model
    mlp_out: Model
    eps: float


def streams_of(
    attn: Model, image: tuple[Model, Model, float], text: tuple[Model, Model, float]
) -> tuple[Stream, Stream]:
    """The streams of image and text of a block with diffusers' joint attention.

    Args:
        attn: the attention.
        image, text: the two linears of the stream's MLP, and the epsilon of its norms.
    """
    return (
        Stream(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, attn.to_out[0], *image),
        Stream(
            attn.add_q_proj,
            attn.add_k_proj,
            attn.add_v_proj,
            attn.norm_added_q,
            attn.norm_added_k,
            attn.to_add_out,
            *text,
        ),
    )


def double_block(
    attention: ShardedAttention,
    image_stream: Stream,
    text_stream: Stream,
    activation: Callable[[Tensor], Tensor],
    image: Tensor,
    text: Tensor,
    image_tables: tuple[Table, Table],
    text_tables: tuple[Table, Table],
    cos: Tensor,
    sin: Tensor,
    lengths: Lengths,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    """A block in which text and image have weights of their own and attend to each other.

    Args:
        attention: over the sharded sequence.
        image_stream, text_stream: modules.
        activation: between the linears of the MLPs.
        image, text: ``[B, S_local, C]`` of each stream.
        image_tables, text_tables: modulation around the attention, and around the MLP.
        cos, sin: ``[S_local, D]`` of text and image tokens.
        lengths, kept: of this forward.

    Returns:
        Text and image.
    """
    tokens = text.shape[1]
    packed = attention.pack(
        [
            _head_inputs(text_stream, modulated_norm(text, text_tables[0], text_stream.eps)),
            _head_inputs(image_stream, modulated_norm(image, image_tables[0], image_stream.eps)),
        ],
        cos,
        sin,
    )
    begun = [attention.begin(packed, lengths)]
    del packed
    out = attention.collect(attention.attend(begun.pop(), lengths, kept))  # which frees what was sent
    # The streams take turns, so that what one of them sums over tp is summed while the other computes.
    image_out, text_out = (
        row_output(image_stream.out, out[:, tokens:], True),
        row_output(text_stream.out, out[:, :tokens]),
    )
    del out
    image, normed = gated_add_and_norm(image, image_tables[0], image_out, image_tables[1], image_stream.eps)
    del image_out
    image_out = mlp_output(image_stream.mlp_in, image_stream.mlp_out, activation, normed)
    del normed
    text, normed = gated_add_and_norm(text, text_tables[0], text_out, text_tables[1], text_stream.eps)
    text_out = row_output(text_stream.mlp_out, activation(text_stream.mlp_in(normed)))
    return clipped(gated_add(text, text_tables[1], text_out)), clipped(gated_add(image, image_tables[1], image_out))


def row_output(linear: Model, x: Tensor, cut: bool = False) -> Pieces:
    """A linear's output ``[B, S, out]``; where it is summed over tp the sum has only been started.

    Args:
        linear: column-parallel linears come before it.
        x: ``[B, S, in_local]``.
        cut: sum in two pieces, the first of them while the second is computed.
    """
    if type(linear) is not RowParallelLinear:
        return Pieces((linear(x),))
    parts, dim = halves(x) if cut else ((x,), 1)
    return Pieces([exchange.all_reduce(linear.partial(part), linear.axis) for part in parts], dim)


def joined(pieces: Pieces) -> Tensor:
    """An output as one tensor, once all of it is there."""
    terms = [pieces.summands(number) for number in range(len(pieces.tensors))]
    parts = [term[0] if len(term) == 1 else term[0] + term[1] for term in terms]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=pieces.dim)


def own_bias(linear: Model) -> Tensor | None:
    """What this rank adds to a linear's product: of sums over tp one rank adds the bias."""
    return linear.partial_bias() if type(linear) is RowParallelLinear else linear.bias


def halves(x: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """``[B, S, C]`` in two parts whose rows lie together (in one if they are few), and the dim that was cut."""
    if x.shape[0] > 1:
        first = x.shape[0] // 2
        return (x[:first], x[first:]), 0
    first = x.shape[1] // (2 * TILE) * TILE
    return ((x[:, :first], x[:, first:]) if first else (x,)), 1


def clipped(x: Tensor) -> Tensor:
    """What fp16 could not hold is cut off."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def table_of(modulation: Tensor, first: int, width: int, picks: Tensor | None = None) -> Table:
    """Shift, scale and gate, which follow one another in ``[n * B, ...]`` from a feature on."""
    shift, scale, gate = (modulation[:, first + i * width : first + (i + 1) * width] for i in range(3))
    return Table(shift, scale, gate, picks)


def _head_inputs(stream: Stream, x: Tensor) -> HeadInputs:
    norms = head_norms(stream.query_norm, stream.key_norm, x.dtype)
    return HeadInputs(stream.query(x), stream.key(x), stream.value(x), *norms)


def head_norms(query_norm: Model, key_norm: Model, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """The weights ``[D]`` of both, and their epsilon."""
    return query_norm.weight, key_norm.weight, torch.finfo(dtype).eps if query_norm.eps is None else query_norm.eps


def mlp_output(mlp_in: Model, mlp_out: Model, activation: Callable[[Tensor], Tensor], x: Tensor) -> Pieces:
    """The output of an MLP of two linears, as of `row_output` in two pieces; ``x`` is used up."""
    into, out = product_of(mlp_in), product_of(mlp_out)
    if activation not in (swiglu, gelu) or not is_long(x) or into.kind is None or out.kind is None:
        return row_output(mlp_out, activation(mlp_in(x)), True)
    summed = type(mlp_out) is RowParallelLinear
    mlp = Mlp(into, mlp_in.bias, out, own_bias(mlp_out), activation is gelu).repeated(x.dtype)
    if not summed:
        mlp_in_place(x, 0, x.shape[0] * x.shape[1], long_mlp.PIECE, mlp)
        return Pieces((x,))
    parts, dim = halves(x)
    return Pieces([exchange.all_reduce(mlp_in_pieces(part, mlp), mlp_out.axis) for part in parts], dim)
