"""Ring attention: keys and values travel around the ring, each hop in flight while the chunk at hand is computed.

Ring Attention with Blockwise Transformers, arXiv:2310.01889; the partial results are merged by their log-sum-exp as in
zhuzilin/ring-flash-attention, in fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Axis
from .kernels import attention_with_lse


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: Axis,
    tokens: list[int],
    kept: list[list[Tensor]] | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys and values of every rank of the ring.

    Args:
        query, key, value: ``[B, S_chunk, H, D]``, the chunk that this ring position holds.
        axis: the ring axis.
        tokens: S_chunk of each ring position.
        kept: for each ring position and sample, the tokens of its chunk that are keys; None if all are.

    Returns:
        ``[B, S_chunk, H, D]`` in the query's dtype.
    """
    batch, _, heads, dim = query.shape
    assert axis.group is not None
    following = dist.get_global_rank(axis.group, (axis.rank + 1) % axis.degree)
    previous = dist.get_global_rank(axis.group, (axis.rank - 1) % axis.degree)
    # Key and value in one buffer: one message a hop.
    chunk = torch.stack((key.transpose(0, 1), value.transpose(0, 1)))  # [2, S_chunk, B, H, D]
    out: Tensor | None = None
    lse: Tensor | None = None
    for hop in range(axis.degree):
        holder = (axis.rank - hop) % axis.degree
        requests, arriving = [], chunk
        if hop < axis.degree - 1:
            arriving = chunk.new_empty(2, tokens[(holder - 1) % axis.degree], batch, heads, dim)
            ops = []
            # An empty chunk (a sequence shorter than the ring) is not sent; both ends know the lengths.
            if chunk.numel():
                ops.append(dist.P2POp(dist.isend, chunk, following, axis.group))
            if arriving.numel():
                ops.append(dist.P2POp(dist.irecv, arriving, previous, axis.group))
            if ops:
                requests = dist.batch_isend_irecv(ops)
        if chunk.shape[1] and query.shape[1]:
            keys, values = (part.transpose(0, 1) for part in chunk.unbind(0))
            part, part_lse = _partial(query, keys, values, None if kept is None else kept[holder])
            out, lse = (part.float(), part_lse) if out is None else _merge(out, lse, part.float(), part_lse)
        for request in requests:
            request.wait()
        chunk = arriving
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


def _merge(out: Tensor, lse: Tensor | None, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial softmax results, out ``[B, S, H, D]`` and lse ``[B, S, H, 1]``, both fp32."""
    assert lse is not None
    out = out - torch.sigmoid(part_lse - lse) * (out - part)
    return out, torch.logaddexp(lse, part_lse)
