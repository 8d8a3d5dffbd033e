"""Attention of double-stream blocks, in which text and image have weights of their own and attend to each other."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from ..parallel.attention import ShardedAttention
from .base import Model


class DoubleStreamProcessor:
    """Joint attention over text and image shards, for diffusers' attention modules with ``add_q_proj`` and the like."""

    def __init__(self, attention: ShardedAttention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Model,
        hidden_states: Tensor,  # [B, S_image_local, C]
        encoder_hidden_states: Tensor,  # [B, S_text_local, C]
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # of text and image, each [S_local, D]
        encoder_hidden_states_mask: Tensor | None = None,
        kv_cache_mode: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        refuse(attention_mask=attention_mask, text_mask=encoder_hidden_states_mask, kv_cache=kv_cache_mode)
        text_tokens = encoder_hidden_states.shape[1]
        image, text = hidden_states, encoder_hidden_states
        query = torch.cat(
            [attn.norm_added_q(heads(attn.add_q_proj(text), attn)), attn.norm_q(heads(attn.to_q(image), attn))], 1
        )
        key = torch.cat(
            [attn.norm_added_k(heads(attn.add_k_proj(text), attn)), attn.norm_k(heads(attn.to_k(image), attn))], 1
        )
        value = torch.cat([heads(attn.add_v_proj(text), attn), heads(attn.to_v(image), attn)], 1)
        out = self.attention(rotate(query, image_rotary_emb), rotate(key, image_rotary_emb), value).flatten(2)
        text_out, image_out = out[:, :text_tokens], out[:, text_tokens:]
        return attn.to_out[1](attn.to_out[0](image_out)), attn.to_add_out(text_out)


def heads(x: Tensor, attn: Model) -> Tensor:
    """``[B, S, H_local * D] -> [B, S, H_local, D]``; how many heads are local follows from the shape."""
    return x.unflatten(-1, (-1, attn.norm_q.weight.shape[0]))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate ``[B, S, H, D]`` by cosines and sines ``[S, D]``, in fp32."""
    # A rank may hold no token of a very short sequence, which diffusers' helper cannot reshape.
    return x if rotary is None or x.shape[1] == 0 else apply_rotary_emb(x, rotary, sequence_dim=1)


def refuse(**others: Any) -> None:
    """Raise ValueError for what an attention module was given and cannot do.

    Processors have to name such arguments in their signature: diffusers drops the others with a line in the log.
    """
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"under parallelism the model takes no {', '.join(given)}; drop masked tokens instead, and call it without "
            "kv_cache"
        )
