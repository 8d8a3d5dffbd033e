"""Attention over a sharded sequence: rank-local queries, keys and values in, rank-local output out, on every layout."""

from __future__ import annotations

from torch import Tensor

from .kernels import attention
from .ring import ring_attention
from .sequence import SequenceShards
from .ulysses import gather_heads, scatter_heads


class ShardedAttention:
    """Computes what one GPU would over the full sequence. USP (arXiv:2405.07719): Ulysses inside, ring outside."""

    def __init__(self, shards: SequenceShards) -> None:
        self.shards = shards

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, S_local, H_local, D]`` each -> ``[B, S_local, H_local, D]``. Tokens carry their position already.

        Attention without a mask does not depend on the order of keys, so the ranks' shards may be joined in any order.
        """
        mesh = self.shards.mesh
        if not mesh.cp.is_split:
            return attention(query, key, value)
        tokens = self.shards.ulysses_tokens()
        if mesh.ulysses.is_split:
            query, key, value = scatter_heads(query, key, value, mesh.ulysses, tokens)
        if mesh.ring.is_split:
            out = ring_attention(query, key, value, mesh.ring, self.shards.ring_tokens())
        else:
            out = attention(query, key, value)
        if mesh.ulysses.is_split:
            out = gather_heads(out, mesh.ulysses, tokens)
        return out
