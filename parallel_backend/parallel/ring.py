"""Ring attention: keys and values travel around the ring, each hop in flight while the chunk at hand is computed.

Ring Attention with Blockwise Transformers, arXiv:2310.01889; the partial results are merged by their log-sum-exp as in
zhuzilin/ring-flash-attention, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mesh import Axis
from . import exchange
from .elementwise import merge
from .exchange import InFlight
from .kernels import attention_with_lse


def first_hop(chunk: Tensor, axis: Axis, tokens: Sequence[int]) -> InFlight:
    """Send this position's keys and values on; what arrives is for `ring_attention`.

    Args:
        chunk: ``[S_chunk, B, 2, H, D]``, keys and values in one buffer: one message a hop.
        axis: the ring axis.
        tokens: S_chunk of each ring position.
    """
    return exchange.shift(chunk, tokens[(axis.rank - 1) % axis.degree], axis, tokens)


def ring_attention(
    query: Tensor,
    chunk: Tensor,
    arriving: InFlight,
    axis: Axis,
    tokens: Sequence[int],
    kept: list[list[Tensor]] | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys and values of every rank of the ring.

    Args:
        query: ``[B, S_chunk, H, D]``, the chunk that this ring position holds.
        chunk: its keys and values, ``[S_chunk, B, 2, H, D]``.
        arriving: what `first_hop` started.
        axis: the ring axis.
        tokens: S_chunk of each ring position.
        kept: for each ring position and sample, the tokens of its chunk that are keys; None if all are.

    Returns:
        ``[B, S_chunk, H, D]`` in the query's dtype.
    """
    out: Tensor | None = None
    lse: Tensor | None = None
    for hop in range(axis.degree):
        holder = (axis.rank - hop) % axis.degree
        last = hop == axis.degree - 1
        if hop:
            # This hop's chunk is there; the next one sets out before it is computed with.
            chunk = exchange.arrived(arriving)
            if not last:
                arriving = exchange.shift(chunk, tokens[(holder - 1) % axis.degree], axis, tokens)
        if not chunk.shape[0] or not query.shape[1]:
            continue
        keys, values = (part.transpose(0, 1) for part in chunk.unbind(2))
        part, part_lse = _partial(query, keys, values, None if kept is None else kept[holder])
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            out, lse = merge(out, lse, part, part_lse, query.dtype if last else torch.float32)
    return query.new_empty(query.shape) if out is None else out.to(query.dtype)


def _partial(query: Tensor, keys: Tensor, values: Tensor, kept: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Attention over one chunk, or over what each sample keeps of it, with its lse ``[B, S, H, 1]``."""
    if kept is None:
        return attention_with_lse(query, keys, values)
    parts = []
    for i, tokens in enumerate(kept):
        one = query[i : i + 1]
        if len(tokens):
            parts.append(attention_with_lse(one, keys[i : i + 1, tokens], values[i : i + 1, tokens]))
        else:
            # As small as fp32 goes, rather than minus infinity, which would make NaN where two such are merged.
            nothing = torch.finfo(torch.float32).min
            parts.append((torch.zeros_like(one), one.new_full((*one.shape[:3], 1), nothing, dtype=torch.float32)))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)
