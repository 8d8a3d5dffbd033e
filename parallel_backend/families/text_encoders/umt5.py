"""umT5, the text encoder of Wan: relative positions in each layer, sharded by heads; its file as ComfyUI has it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel.tensor import Model, Shard
from ..file_shapes import count_blocks, shape_of
from ..text_encoder import TextEncoder

TOKENIZER = "spiece_model"
"""The tensor with the tokenizer: SentencePiece's model as bytes."""
_TABLE = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
MARKS = (_TABLE.format(0), _TABLE.format(1), "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
"""T5 has a table of positions in its first layer alone."""
ATTENTION = "sdpa"
"""PyTorch's own."""
_PREFIX = "encoder."


class Umt5(TextEncoder):
    """umT5-XXL, of which Wan has the encoder (Chung et al., UniMax, arXiv:2304.09151)."""

    title = "umT5"
    class_name = "UMT5EncoderModel"
    imports = ("transformers.models.umt5.modeling_umt5",)

    def layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (_config(config)["num_layers"],)

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        heads = _config(config)["num_heads"]
        of_heads, of_all = Shard("column", units=heads), Shard("row", units=heads)
        return {
            "embed_tokens": Shard("embedding"),
            "block.*.layer.0.SelfAttention.q": of_heads,
            "block.*.layer.0.SelfAttention.k": of_heads,
            "block.*.layer.0.SelfAttention.v": of_heads,
            "block.*.layer.0.SelfAttention.o": of_all,
            "block.*.layer.0.SelfAttention.relative_attention_bias": Shard("local_embedding", units=heads),
            "block.*.layer.1.DenseReluDense.wi_0": Shard("column"),
            "block.*.layer.1.DenseReluDense.wi_1": Shard("column"),
            "block.*.layer.1.DenseReluDense.wo": Shard("row"),
        }

    def degree(self, config: Mapping[str, Any], ranks: int) -> int:
        found = _config(config)
        sizes = [found[name] for name in ("num_heads", "d_model", "d_ff")]
        return max(n for n in range(1, ranks + 1) if ranks % n == 0 and all(size % n == 0 for size in sizes))

    def text_model(self, text_encoder: Model) -> Model:
        return text_encoder.encoder

    def build(self, config: Mapping[str, Any]) -> Model:
        from transformers import UMT5Config, UMT5EncoderModel

        full = UMT5Config(**config)
        if not full.is_gated_act or not full.dense_act_fn.startswith("gelu"):
            raise ValueError(f"its layers are {full.feed_forward_proj}, where umT5 has gated-gelu")
        with torch.device("meta"):
            # A file's configuration may ask for attention kernels that are code from elsewhere; it gets none.
            return UMT5EncoderModel._from_config(full, attn_implementation=ATTENTION).encoder

    def localize(self, text_model: Model) -> None:
        for block in text_model.block:
            attention = block.layer[0].SelfAttention
            attention.inner_dim = attention.q.weight.shape[0]
            attention.n_heads = attention.inner_dim // attention.key_value_proj_dim

    def keys(self, names: Sequence[str]) -> dict[str, str]:
        found = {name.removeprefix(_PREFIX): name for name in names if name.startswith(_PREFIX)}
        if "shared.weight" in names:  # both where a file keeps what is tied twice
            found["embed_tokens.weight"] = "shared.weight"
        return found

    def patch_name(self, name: str) -> str:
        return "shared.weight" if name == "embed_tokens.weight" else _PREFIX + name

    def encode(
        self,
        text_model: Model,
        ids: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        images: Tensor | None = None,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> Tensor:
        """The last, normed hidden state ``[B, L, d_model]``; zeros where the mask is, which Wan attends to as well.

        Not by the module's own forward, which casts to the dtype of ``wo`` (for a weight in 8 bits, to 8 bits) and
        finds out the same positions in each layer.
        """
        assert images is None, "it does not look at images"
        x = text_model.embed_tokens(ids)
        buckets = _buckets(text_model.config, ids.shape[1], ids.device)
        hidden = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(
            mask == 0, torch.finfo(x.dtype).min
        )
        for block in text_model.block:
            attention, mlp = block.layer[0], block.layer[1]
            x = x + _attend(attention.SelfAttention, attention.layer_norm(x), buckets, hidden[:, None, None])
            gated, normed = mlp.DenseReluDense, mlp.layer_norm(x)
            x = x + gated.wo(F.gelu(gated.wi_0(normed), approximate="tanh") * gated.wi_1(normed))
            if x.dtype == torch.float16:  # as transformers does: some channels are beyond its range
                x = x.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
        return text_model.final_layer_norm(x) * mask.unsqueeze(-1).to(x.dtype)

    file_title = "umT5-XXL (umt5_xxl_fp16.safetensors, or fp8_e4m3fn_scaled)"
    file_tokenizer = TOKENIZER

    def is_file(self, keys: Collection[str]) -> bool:
        return all(key in keys for key in MARKS)

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The configuration of `UMT5EncoderModel`; ValueError for a tensor that is missing or cannot be."""
        vocab, hidden = shape_of(shapes, "shared.weight")
        buckets, heads = shape_of(shapes, _TABLE.format(0))
        inner = shape_of(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight")[0]
        if inner % heads:
            raise ValueError(f"encoder.block.0 has {inner} query features for {heads} heads; the file is damaged")
        return {
            "vocab_size": vocab,
            "d_model": hidden,
            "d_kv": inner // heads,
            "d_ff": shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
            "num_layers": count_blocks(shapes, "encoder.block"),
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
            "feed_forward_proj": "gated-gelu",
        }


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with all its values; one's may be left out where they are the defaults."""
    from transformers import UMT5Config

    return UMT5Config(**config).to_dict()


def _attend(attention: Model, x: Tensor, buckets: Tensor, hidden: Tensor) -> Tensor:
    """Self-attention of this rank's heads, unscaled; ``hidden [B, 1, 1, L]`` is added for keys that are masked."""
    q, k, v = (
        linear(x).unflatten(-1, (-1, attention.key_value_proj_dim)).transpose(1, 2)
        for linear in (attention.q, attention.k, attention.v)
    )
    positions = attention.relative_attention_bias(buckets).movedim(-1, 0)  # [H_local, L, L]
    # Neither sum may leave the range of the number format.
    scores = (positions + hidden).clamp_min(torch.finfo(x.dtype).min)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=1.0)
    return attention.o(y.transpose(1, 2).flatten(2))


def _buckets(config: Any, length: int, device: torch.device) -> Tensor:
    """``[L, L]``: which row of a layer's table a query (row) has for a key (column); Raffel et al., arXiv:1910.10683.

    Half of the rows are for keys behind the query. Of each half, half are for one distance each, the others for ranges
    that grow with the logarithm, up to the largest distance that is told apart.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    positions = torch.arange(length, device=device)
    offset = positions[None, :] - positions[:, None]
    distance = offset.abs()
    span = math.log(config.relative_attention_max_distance / exact)
    beyond = torch.log(distance.clamp_min(1).float() / exact) / span * (half - exact)
    far = (exact + beyond.long()).clamp_max(half - 1)
    return torch.where(distance < exact, distance, far) + (offset > 0) * half
