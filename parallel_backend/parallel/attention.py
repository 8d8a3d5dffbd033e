"""Attention over a sharded sequence: rank-local queries, keys and values in, rank-local output out, on every layout.

It comes in steps, between which a block computes what does not wait for the exchanges that they start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import exchange
from .elementwise import HeadInputs, pack, turn
from .exchange import InFlight
from .kernels import attention
from .ring import first_hop, ring_attention
from .sequence import SequenceShards


class Lengths(NamedTuple):
    """Tokens of the forward in progress: of each rank of the ulysses group, and of each ring position's chunk."""

    ulysses: tuple[int, ...]
    ring: tuple[int, ...]


class Begun(NamedTuple):
    """What `ShardedAttention.begin` has ready, or under way."""

    heads: Tensor | InFlight
    """Queries, keys and values ``[S, B, 3, h, D]``; ``[S, B, 1, h, D]``, queries alone, if there is a chunk."""
    chunk: Tensor | None = None
    """This ring position's keys and values."""
    arriving: InFlight | None = None
    """Those of the previous position."""


class ShardedAttention(nn.Module):
    """Computes what one GPU would over the full sequence. USP (arXiv:2405.07719): Ulysses inside, ring outside.

    Ulysses (arXiv:2309.14509) turns a shard of the sequence with all heads into all of it with a shard of heads. Query,
    key and value travel together in one exchange, the output in another.

    (A module without weights: the compiler takes numbers that are found on modules as constants.)
    """

    def __init__(self, shards: SequenceShards) -> None:
        super().__init__()
        self.shards = shards
        self.ulysses, self.ring, self.tp = shards.mesh.ulysses, shards.mesh.ring, shards.mesh.tp
        self._only_ring = self.ring.is_split and not self.ulysses.is_split

    def lengths(self) -> Lengths:
        """Lengths of the forward in progress; of no axis that is not split."""
        return Lengths(
            tuple(self.shards.ulysses_tokens()) if self.ulysses.is_split else (),
            tuple(self.shards.ring_tokens()) if self.ring.is_split else (),
        )

    def pack(
        self, streams: Sequence[HeadInputs], cos: Tensor, sin: Tensor, factors: Tensor | None = None
    ) -> list[Tensor]:
        """Norm and rotate queries and keys of all streams' tokens, and lay them out for `begin`.

        ``factors`` are those of `elementwise.pack`.
        """
        return pack(streams, cos, sin, self.ulysses.degree, apart=self._only_ring, factors=factors)

    def pack_fused(
        self, fused: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> list[Tensor]:
        """As `pack`, for one stream whose queries, keys and values lie side by side, ``[B, S, 3 * H * D]``.

        They are used up: where they stay on this rank, they may stay in their memory, too.
        """
        if self.ulysses.is_split or self.ring.is_split:
            query, key, value = fused.chunk(3, dim=-1)
            return self.pack([HeadInputs(query, key, value, query_weight, key_weight, eps)], cos, sin)
        return [turn(fused, query_weight, key_weight, eps, cos, sin).transpose(0, 1)]

    def begin(self, packed: list[Tensor], lengths: Lengths) -> Begun:
        """Start the way of queries, keys and values to where attention needs them.

        Attention does not depend on the order of keys, so the ranks' shards may be joined in any order.
        """
        if self._only_ring:
            query, chunk = packed
            return Begun(query, chunk, first_hop(chunk, self.ring, lengths.ring))
        if self.ulysses.is_split:
            return Begun(exchange.spread_heads(packed[0], lengths.ulysses, self.ulysses))
        return Begun(packed[0])

    def attend(self, begun: Begun, lengths: Lengths, kept: list[list[Tensor]] | None) -> Tensor | InFlight:
        """Wait for what was begun, compute, and start the output's way back.

        Args:
            begun: of `begin`; whoever gives it up frees what was sent, once it has arrived.
            lengths: of this forward.
            kept: the keys that there are, as in `SequenceShards.kept_keys`. The others are dropped, not masked.

        Returns:
            The output in flight, for `collect`.
        """
        heads, chunk, arriving = begun
        del begun
        if isinstance(heads, InFlight):
            heads = exchange.arrived(heads)
        if self.ring.is_split:
            if chunk is None or arriving is None:
                chunk = heads[:, :, 1:].contiguous()
                arriving = first_hop(chunk, self.ring, lengths.ring)
            out = ring_attention(heads[:, :, 0].transpose(0, 1), chunk, arriving, self.ring, lengths.ring, kept)
        else:
            query, key, value = (x.transpose(0, 1) for x in heads.unbind(2))
            out = _attention(query, key, value, kept)
        if not self.ulysses.is_split:
            return out
        # [S_chunk, B, h, D]
        return exchange.gather_heads(out.transpose(0, 1).contiguous(), lengths.ulysses, self.ulysses)

    def collect(self, out: Tensor | InFlight) -> Tensor:
        """The output that `attend` started, with all heads that this tp rank holds: ``[B, S_local, H * D]``."""
        if not isinstance(out, InFlight):
            return out.flatten(2)
        degree = self.ulysses.degree
        received = exchange.arrived(out)
        _, batch, heads, dim = received.shape
        local = received.shape[0] // degree
        received = received.view(degree, local, batch, heads, dim).permute(2, 1, 0, 3, 4)
        return received.reshape(batch, local, degree * heads * dim)


def _attention(query: Tensor, key: Tensor, value: Tensor, kept: list[list[Tensor]] | None) -> Tensor:
    """Attention over all keys that are there, or over those that each sample keeps."""
    if kept is None:
        return attention(query, key, value)
    parts = [
        attention(query[i : i + 1], key[i : i + 1, tokens], value[i : i + 1, tokens])
        for i, tokens in enumerate(kept[0])
    ]
    return torch.cat(parts)
