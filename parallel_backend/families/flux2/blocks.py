"""FLUX.2's blocks on a rank: the double-stream and the single-stream block over a shard of the sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...blocks.double_stream import Kept, clipped, double_block, head_norms, streams_of, table_of
from ...blocks.embedding import ExactTime, KeptRotary
from ...blocks.forwards import BlockForwards, refuse
from ...blocks.two_part_output import early_output, early_output_of_long, two_part_output
from ...config import Speed
from ...parallel.attention import Lengths, ShardedAttention
from ...parallel.elementwise import gated_add, modulated_norm, swiglu
from ...parallel.long_mlp import is_long
from ...parallel.products import product_of
from ...parallel.sequence import Entrance, SequenceShards
from ...parallel.tensor import Model


class Flux2Entrance(Entrance):
    """Has the model know the exact timestep and guidance, and keeps its rotary embeddings from step to step."""

    def __init__(self, transformer: Model, shards: SequenceShards, forwards: BlockForwards) -> None:
        self.transformer, self.shards, self.forwards = transformer, shards, forwards
        self.time = ExactTime(transformer.time_guidance_embed, _embed_time)
        self.rotary = KeptRotary(transformer.pos_embed)
        self._ids: list[Tensor] = []

    def prepare(self, arguments: dict[str, Any]) -> None:
        self.forwards.begin(arguments, self.transformer)
        self.time.begin(arguments)
        self._ids = [arguments["txt_ids"], arguments["img_ids"]]

    def localize(self, arguments: dict[str, Any]) -> None:
        self.rotary.end()
        rank = self.shards.mesh.cp.rank
        for sizes, whole, local in zip(
            self.shards.streams, self._ids, (arguments["txt_ids"], arguments["img_ids"]), strict=True
        ):
            self.rotary.begin(whole, local, (sum(sizes[:rank]), sizes[rank]))
        self._ids = []

    def forget_graphs(self) -> None:
        self.forwards.forget_graphs()

    def remove(self) -> None:
        for part in (self.forwards, self.time, self.rotary):
            part.remove()


def install(transformer: Model, attention: ShardedAttention, speed: Speed) -> Flux2Entrance:
    """Give all blocks of a transformer forwards for a rank."""
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    forwards = BlockForwards(attention, speed, (doubles, singles))
    forwards.replace(doubles, 2, _double, _double_forward)
    forwards.replace(singles, 1, _single, _single_forward)
    return Flux2Entrance(transformer, attention.shards, forwards)


def _embed_time(
    module: Model, exact_timestep: Tensor, exact_guidance: Tensor | None, timestep: Tensor, guidance: Tensor | None
) -> Tensor:
    """`Flux2TimestepGuidanceEmbeddings`, whose sinusoids are rounded to the dtype of the weights once they are made."""
    dtype = timestep.dtype
    embedded = module.timestep_embedder(module.time_proj(exact_timestep * 1000).to(dtype))
    if exact_guidance is None or module.guidance_embedder is None:
        return embedded
    return embedded + module.guidance_embedder(module.time_proj(exact_guidance * 1000).to(dtype))


def _double_forward(
    run: Any,
    block: Model,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    refuse(**(joint_attention_kwargs or {}))
    return run(block, hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, *image_rotary_emb)


def _single_forward(
    run: Any,
    block: Model,
    hidden_states: Tensor,
    encoder_hidden_states: None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    refuse(encoder_hidden_states=encoder_hidden_states, **(joint_attention_kwargs or {}))
    return run(block, hidden_states, temb_mod, *image_rotary_emb)


def _double(
    block: Model,
    attention: ShardedAttention,
    image: Tensor,  # [B, S_image_local, C]
    text: Tensor,  # [B, S_text_local, C]
    image_modulation: Tensor,  # [B, 6 C]
    text_modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Lengths,
    kept: Kept,
) -> tuple[Tensor, Tensor]:
    image_stream, text_stream = streams_of(
        block.attn,
        (block.ff.linear_in, block.ff.linear_out, block.norm1.eps),
        (block.ff_context.linear_in, block.ff_context.linear_out, block.norm1_context.eps),
    )
    (width,) = block.norm1.normalized_shape
    image_tables, text_tables = (
        (table_of(modulation, 0, width), table_of(modulation, 3 * width, width))
        for modulation in (image_modulation, text_modulation)
    )
    return double_block(
        attention,
        image_stream,
        text_stream,
        swiglu,
        image,
        text,
        image_tables,
        text_tables,
        cos,
        sin,
        lengths,
        kept,
    )


def _single(
    block: Model,
    attention: ShardedAttention,
    x: Tensor,  # [B, S_local, C], text first
    modulation: Tensor,  # [B, 3 C]
    cos: Tensor,
    sin: Tensor,
    lengths: Lengths,
    kept: Kept,
) -> Tensor:
    attn = block.attn
    (width,) = block.norm.normalized_shape
    table = table_of(modulation, 0, width)
    normed = modulated_norm(x, table, block.norm.eps)
    # Each fused block is sharded by itself, so the local widths stand in the ratio of the full ones.
    full = 3 * attn.inner_dim + attn.mlp_mult_factor * attn.mlp_hidden_dim
    into = product_of(attn.to_qkv_mlp_proj)
    local = attn.inner_dim * into.shape[0] // full
    qkv, gate_up = into.split_rows(3 * local)
    whole = attn.to_qkv_mlp_proj.bias
    qkv_bias, gate_up_bias = (None, None) if whole is None else (whole[: 3 * local], whole[3 * local :])
    packed = attention.pack_fused(
        qkv.product(normed, qkv_bias),
        *head_norms(attn.norm_q, attn.norm_k, x.dtype),
        cos,
        sin,
    )
    begun = [attention.begin(packed, lengths)]
    del packed
    # The MLP runs on the same input as attention: its first half under the way there, its second under the way back.
    if is_long(normed) and gate_up.kind is not None and product_of(attn.to_out).kind is not None:
        waits = attention.ulysses.is_split or attention.ring.is_split
        early = early_output_of_long(attn.to_out, normed, gate_up, gate_up_bias, waits)
    else:
        early = early_output(attn.to_out, swiglu(gate_up.product(normed, gate_up_bias)))
    del normed, qkv, gate_up
    out = attention.attend(begun.pop(), lengths, kept)  # which frees what was sent
    pieces = two_part_output(attn.to_out, early, lambda: attention.collect(out), attention.ulysses.is_split)
    return clipped(gated_add(x, table, pieces))
