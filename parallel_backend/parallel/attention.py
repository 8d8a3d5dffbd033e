"""Attention over a sharded sequence: rank-local queries, keys and values in, rank-local output out, on every layout."""

from __future__ import annotations

import torch
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

        Attention does not depend on the order of keys, so the ranks' shards may be joined in any order. Keys that
        `SequenceShards.hide_keys` named are dropped, not masked.
        """
        mesh, kept = self.shards.mesh, self.shards.kept_keys
        if not mesh.cp.is_split:
            return _attention(query, key, value, kept)
        tokens = self.shards.ulysses_tokens()
        if mesh.ulysses.is_split:
            query, key, value = scatter_heads(query, key, value, mesh.ulysses, tokens)
        if mesh.ring.is_split:
            out = ring_attention(query, key, value, mesh.ring, self.shards.ring_tokens(), kept)
        else:
            out = _attention(query, key, value, kept)
        if mesh.ulysses.is_split:
            out = gather_heads(out, mesh.ulysses, tokens)
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, kept: list[list[Tensor]] | None) -> Tensor:
    """Attention over all keys that are there, or over those that each sample keeps."""
    if kept is None:
        return attention(query, key, value)
    parts = [
        attention(query[i : i + 1], key[i : i + 1, tokens], value[i : i + 1, tokens])
        for i, tokens in enumerate(kept[0])
    ]
    return torch.cat(parts)
