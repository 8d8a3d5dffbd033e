"""Ulysses: one all-to-all turns a shard of the sequence with all heads into the whole sequence with a shard of heads.

DeepSpeed-Ulysses, arXiv:2309.14509. Query, key and value travel together in one exchange, the output in another.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Axis


def scatter_heads(query: Tensor, key: Tensor, value: Tensor, axis: Axis, tokens: list[int]) -> tuple[Tensor, ...]:
    """Exchange tokens for heads: ``[B, S_local, H, D]`` three times -> ``[B, S, H / degree, D]`` three times.

    Args:
        query, key, value: rank-local tokens, all heads that this tp rank holds.
        axis: the ulysses axis; its degree divides H.
        tokens: S_local of each rank of the axis; S is their sum.
    """
    batch, local, heads, dim = query.shape
    # Destination rank outermost, tokens next: a rank's share is then one contiguous run whatever the batch.
    packed = torch.stack((query, key, value), dim=2).view(batch, local, 3, axis.degree, heads // axis.degree, dim)
    packed = packed.permute(3, 1, 0, 2, 4, 5).contiguous().flatten(0, 1)  # [degree * S_local, B, 3, h, D]
    received = packed.new_empty(sum(tokens), *packed.shape[1:])
    dist.all_to_all_single(received, packed, tokens, [local] * axis.degree, group=axis.group)
    query, key, value = received.unbind(2)  # [S, B, h, D]
    return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)


def gather_heads(out: Tensor, axis: Axis, tokens: list[int]) -> Tensor:
    """Exchange heads for tokens, the way back: ``[B, S, h, D] -> [B, S_local, h * degree, D]``."""
    batch, _, heads, dim = out.shape
    local = tokens[axis.rank]
    packed = out.transpose(0, 1).contiguous()  # [S, B, h, D]
    received = packed.new_empty(axis.degree * local, batch, heads, dim)
    dist.all_to_all_single(received, packed, [local] * axis.degree, tokens, group=axis.group)
    received = received.view(axis.degree, local, batch, heads, dim).permute(2, 1, 0, 3, 4)
    return received.reshape(batch, local, axis.degree * heads, dim)
