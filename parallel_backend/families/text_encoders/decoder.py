"""Text encoders that are decoders of the Llama kind (Mistral, Qwen): how one is sharded, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...parallel.tensor import Model, Shard

ATTENTION = "sdpa"
"""PyTorch's own."""


def build_decoder(config: Any) -> Model:
    """The text model of transformers' configuration, with weights on the meta device.

    A file's configuration may ask for attention kernels and classes that are code from elsewhere; it gets none.
    """
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(config, attn_implementation=ATTENTION, trust_remote_code=False)


def decoder_plan(text: Mapping[str, Any]) -> dict[str, Shard]:
    """How each weight of the text model of a configuration is sharded."""
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    column, row = Shard("column"), Shard("row")
    kv = Shard("column", units=kv_heads)
    return {
        "embed_tokens": Shard("embedding"),
        # A rank has the query heads of the kv heads that it has.
        "layers.*.self_attn.q_proj": Shard("column", units=heads, groups=kv_heads),
        "layers.*.self_attn.k_proj": kv,
        "layers.*.self_attn.v_proj": kv,
        "layers.*.self_attn.o_proj": Shard("row", units=heads, groups=kv_heads),
        "layers.*.mlp.gate_proj": column,
        "layers.*.mlp.up_proj": column,
        "layers.*.mlp.down_proj": row,
    }


def decoder_degree(text: Mapping[str, Any], ranks: int) -> int:
    """Over how many ranks (a divisor of ``ranks``) a text model can be sharded.

    Kv heads are split, or held by several ranks each, among which their query heads are split: 28 query and 4 kv heads
    on 8 ranks make 4 and 3 query heads in turn, with one kv head on each rank.
    """
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]

    def fits(degree: int) -> bool:
        if any(size % degree for size in (text["intermediate_size"], text["hidden_size"])):
            return False
        return kv_heads % degree == 0 or (degree % kv_heads == 0 and degree // kv_heads <= heads // kv_heads)

    return max(degree for degree in range(1, ranks + 1) if ranks % degree == 0 and fits(degree))


def localize_decoder(text_model: Model) -> None:
    """Tell a sharded text model's attention how many query heads share a kv head on this rank."""
    for layer in text_model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0]


def keys_beside(names: Sequence[str], anchor: str, without: str = "") -> dict[str, str]:
    """Names without what stands before ``anchor`` -> names in a checkpoint.

    Args:
        names: in the checkpoint.
        anchor: a name that one of them ends with, such as ``embed_tokens.weight``.
        without: a name that has this in it is not the one that is meant.

    Raises:
        ValueError: none of them does, or several.
    """
    found = [name for name in names if name.endswith(anchor) and not (without and without in name)]
    if len(found) != 1:
        raise ValueError(f"the text encoder's weights have {len(found)} tensors named *{anchor}; one is expected")
    prefix = found[0][: -len(anchor)]
    return {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
