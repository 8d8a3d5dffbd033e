"""FLUX.2's transformer: `Flux2Transformer2DModel` of diffusers."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...cache.block_cache import BlockStack
from ...config import ParallelismConfig, Speed
from ...parallel.tensor import Model, Shard
from ..conditioning import Conditioning
from ..transformer import Transformer
from . import files

if TYPE_CHECKING:
    from ...parallel.attention import ShardedAttention
    from ...parallel.sequence import Entrance

REFERENCE_SPACING = 10
"""Distance of reference images along the time coordinate, as the model was trained."""


class Flux2Transformer(Transformer):
    """FLUX.2-dev: 8 double-stream and 48 single-stream blocks of 48 heads x 128, 32.2 B parameters; klein has fewer.

    Double-stream blocks keep text and image apart but for attention; single-stream blocks run on both joined, text
    first. One modulation per stream type is shared by all blocks.
    """

    title = "FLUX.2"
    class_name = "Flux2Transformer2DModel"
    sequence_inputs = (("encoder_hidden_states", "txt_ids"), ("hidden_states", "img_ids"))
    output_stream = 1
    block_stacks = (
        BlockStack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        BlockStack("single_transformer_blocks", ("hidden_states",)),
    )
    imports = ("diffusers.models.transformers.transformer_flux2", "parallel_backend.families.flux2.blocks")
    latent_channels = 128
    latent_downscale = pixel_multiple = 16
    conditioning_tensors = ("guidance",)
    conditioning_options: Mapping[str, tuple[str, ...]] = {"reference_method": ("index",)}

    def build(self, config: Mapping[str, Any]) -> Model:
        from diffusers import Flux2Transformer2DModel

        with torch.device("meta"):
            return Flux2Transformer2DModel.from_config(dict(config)).eval()

    def is_file(self, keys: Collection[str]) -> bool:
        return files.MARK in keys

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return files.config_of(shapes)

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return files.rows_of(name)

    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        layout.check_heads(config["num_attention_heads"], f"this {self.title} transformer")
        _, mlp = _widths(config)
        if mlp % layout.tp_size:
            fitting = [d for d in range(1, layout.tp_size) if mlp % d == 0 and config["num_attention_heads"] % d == 0]
            raise ValueError(
                f"the {mlp} features of this {self.title} transformer's MLP do not divide by tp_size={layout.tp_size} "
                f"({layout.describe()}); tp_size {', '.join(map(str, fitting))} would work"
            )

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        inner, mlp = _widths(config)
        column, row = Shard("column"), Shard("row")
        gathered = Shard("column", gather_output=True)
        swiglu = Shard("column", blocks=(mlp, mlp))  # gate, up
        return {
            # Double-stream blocks: image and text side, attention and MLP.
            "transformer_blocks.*.attn.to_q": column,
            "transformer_blocks.*.attn.to_k": column,
            "transformer_blocks.*.attn.to_v": column,
            "transformer_blocks.*.attn.to_out.0": row,
            "transformer_blocks.*.attn.add_q_proj": column,
            "transformer_blocks.*.attn.add_k_proj": column,
            "transformer_blocks.*.attn.add_v_proj": column,
            "transformer_blocks.*.attn.to_add_out": row,
            "transformer_blocks.*.ff.linear_in": swiglu,
            "transformer_blocks.*.ff.linear_out": row,
            "transformer_blocks.*.ff_context.linear_in": swiglu,
            "transformer_blocks.*.ff_context.linear_out": row,
            # Single-stream blocks: q, k, v, gate and up are one linear; attention and MLP outputs are one linear.
            "single_transformer_blocks.*.attn.to_qkv_mlp_proj": Shard("column", blocks=(inner, inner, inner, mlp, mlp)),
            "single_transformer_blocks.*.attn.to_out": Shard("row", blocks=(inner, mlp)),
            # Modulation: 17 D^2 weights (1.2 GiB in FLUX.2-dev) that run on one vector a step. They are sharded, and
            # the vectors gathered; embedders and proj_out (0.4 GiB) are replicated, since they run on whole sequences.
            "double_stream_modulation_img.linear": gathered,
            "double_stream_modulation_txt.linear": gathered,
            "single_stream_modulation.linear": gathered,
            "norm_out.linear": gathered,
        }

    def install(self, transformer: Model, attention: ShardedAttention, speed: Speed) -> Entrance:
        from . import blocks

        return blocks.install(transformer, attention, speed)

    def inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        context, guidance = conditioning.context, conditioning.tensors.get("guidance")
        tokens = [_tokens(x)]
        for reference in conditioning.references:
            if reference.shape[0] not in (1, x.shape[0]):
                raise ValueError(f"a reference batch of {reference.shape[0]} does not fit a batch of {x.shape[0]}")
            tokens.append(_tokens(reference).expand(x.shape[0], -1, -1))
        return {
            "hidden_states": torch.cat(tokens, dim=1),
            "encoder_hidden_states": context,
            "timestep": timestep,
            "guidance": None if guidance is None else guidance.to(x.device),
            "img_ids": _image_ids(tuple(tuple(image.shape[-2:]) for image in (x, *conditioning.references)), x.device),
            "txt_ids": _text_ids(context.shape[1], x.device),
        }

    def picture_tokens(self, arguments: Mapping[str, Any]) -> int:
        times = arguments["img_ids"][..., 0]  # 0 for the picture alone
        return int((times == 0).sum(-1).flatten()[0])

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return output[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def heads(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"]

    def width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def context_width(self, config: Mapping[str, Any]) -> int:
        return config["joint_attention_dim"]

    def example_tensors(self, config: Mapping[str, Any], latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"guidance": (latent[0],)} if config.get("guidance_embeds", True) else {}

    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        # The peak of a single-stream block is where queries and keys are rotated in fp32: residual, normed input and
        # conditioning (3 D) are whole on every tp rank; the fused projection (q, k, v, gate, up: 3 D + 2 MLP) and the
        # copies of q and k (9 D) are sharded over tp. At high tp a double-stream block takes over, which holds 8 D that
        # are not sharded. This is within 10 % of the allocations traced on the meta device; on an H200 FLUX.2-dev took
        # 1.2 GiB on one GPU and 0.6 GiB under Ulysses-2, against 1.1 and 0.55 here.
        inner, mlp = _widths(config)
        return max(8 * inner, 3 * inner + (3 * inner + 2 * mlp + 9 * inner) // tp)


def _widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """Width of the transformer, and of one half of its gated MLP."""
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    return inner, int(inner * config["mlp_ratio"])


def _tokens(latent: Tensor) -> Tensor:
    """``[B, C, H, W] -> [B, H * W, C]``."""
    return latent.flatten(2).transpose(1, 2)


# The same tensors for the same sizes: the model embeds them once (`KeptRotary`).
@functools.lru_cache(8)
def _image_ids(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Coordinates (time, row, column, 0) of each token of all images, ``[S, 4]``; references follow the picture."""
    parts = []
    for index, (height, width) in enumerate(sizes):
        ids = torch.zeros(height, width, 4, device=device)
        ids[..., 0] = REFERENCE_SPACING * index
        ids[..., 1] = torch.arange(height, device=device)[:, None]
        ids[..., 2] = torch.arange(width, device=device)[None, :]
        parts.append(ids.flatten(0, 1))
    return torch.cat(parts)


@functools.lru_cache(8)
def _text_ids(length: int, device: torch.device) -> Tensor:
    """Coordinates (0, 0, 0, place in the prompt) of each token, ``[L, 4]``."""
    ids = torch.zeros(length, 4, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids
