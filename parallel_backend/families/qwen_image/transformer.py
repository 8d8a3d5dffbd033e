"""Qwen-Image's transformer: `QwenImageTransformer2DModel` of diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ...cache.block_cache import BlockStack
from ...config import ParallelismConfig, Speed
from ...parallel.tensor import Model, Shard
from ..conditioning import Conditioning
from ..file_shapes import count_blocks, shape_of
from ..transformer import Transformer
from . import positions
from .positions import LatentImages, QwenEntrance

if TYPE_CHECKING:
    from ...parallel.attention import ShardedAttention

PATCH = 2
"""Latent positions to a token, along each side."""
MARK = "transformer_blocks.0.img_mod.1.weight"
ZERO_MARK = "__index_timestep_zero__"
"""An empty tensor in files of models that take references as at timestep 0 (Qwen-Image-Edit-2511)."""
METHODS = ("index", "index_timestep_zero", "negative_index", "offset")


class QwenImageTransformer(Transformer):
    """Qwen-Image: 60 double-stream blocks of 24 heads x 128, 20.4 B parameters, a third of them modulation.

    Prompts keep their own length. The edit models take references behind the picture's tokens, and the text encoder
    looks at them too.
    """

    title = "Qwen-Image"
    class_name = "QwenImageTransformer2DModel"
    sequence_inputs = (("encoder_hidden_states",), ("hidden_states",))
    output_stream = 1
    block_stacks = (BlockStack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),)
    imports = ("diffusers.models.transformers.transformer_qwenimage", "parallel_backend.families.qwen_image.blocks")
    latent_channels = 16
    latent_dims = 5
    latent_downscale = 8
    pixel_multiple = 16
    conditioning_tensors = ("mask",)
    conditioning_options: Mapping[str, tuple[str, ...]] = {
        "reference_method": METHODS,
        "positions": ("comfyui", "diffusers"),
    }

    def build(self, config: Mapping[str, Any]) -> Model:
        if config.get("use_layer3d_rope") or config.get("use_additional_t_cond"):
            raise ValueError(
                "this is Qwen-Image-Layered, which is not supported; Qwen-Image and Qwen-Image-Edit (2509, 2511) are"
            )
        from diffusers import QwenImageTransformer2DModel

        # Frequencies of the positions are tables rather than buffers, so they are made where they are used.
        with torch.device("meta"):
            return QwenImageTransformer2DModel.from_config(dict(config)).eval()

    def is_file(self, keys: Collection[str]) -> bool:
        return "txt_norm.weight" in keys and MARK in keys

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shape_of(shapes, "img_in.weight")
        if channels != self.latent_channels * PATCH**2:
            raise ValueError(
                f"its tokens have {channels} features, those of {self.title} {self.latent_channels * PATCH**2}; it is "
                "another model (such as Mage-Flow), which is not supported"
            )
        (head,) = shape_of(shapes, "transformer_blocks.0.attn.norm_q.weight", dims=1)
        return {
            "patch_size": PATCH,
            "in_channels": channels,
            "out_channels": shape_of(shapes, "proj_out.weight")[0] // PATCH**2,
            "num_layers": count_blocks(shapes, "transformer_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shape_of(shapes, "txt_in.weight")[1],
            "axes_dims_rope": [head // 8, 7 * head // 16, 7 * head // 16],
            "zero_cond_t": ZERO_MARK in shapes,
            "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in shapes,
        }

    file_marks = (ZERO_MARK,)

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return ((name, 0, 1),)  # ComfyUI's names are diffusers'

    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        layout.check_heads(config["num_attention_heads"], f"this {self.title} transformer")

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        column, row = Shard("column"), Shard("row")
        gathered = Shard("column", gather_output=True)
        return {
            "transformer_blocks.*.attn.to_q": column,
            "transformer_blocks.*.attn.to_k": column,
            "transformer_blocks.*.attn.to_v": column,
            "transformer_blocks.*.attn.to_out.0": row,
            "transformer_blocks.*.attn.add_q_proj": column,
            "transformer_blocks.*.attn.add_k_proj": column,
            "transformer_blocks.*.attn.add_v_proj": column,
            "transformer_blocks.*.attn.to_add_out": row,
            "transformer_blocks.*.img_mlp.net.0.proj": column,
            "transformer_blocks.*.img_mlp.net.2": row,
            "transformer_blocks.*.txt_mlp.net.0.proj": column,
            "transformer_blocks.*.txt_mlp.net.2": row,
            # Modulation: 12.7 of 38 GiB in bf16, that run on one vector a step.
            "transformer_blocks.*.img_mod.1": gathered,
            "transformer_blocks.*.txt_mod.1": gathered,
            "norm_out.linear": gathered,
        }

    def install(self, transformer: Model, attention: ShardedAttention, speed: Speed) -> QwenEntrance:
        from . import blocks

        forwards = blocks.install(transformer, attention, speed)
        return QwenEntrance(transformer, attention.shards, forwards)

    def inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        if x.shape[2] != 1:
            raise ValueError(
                f"a latent of {x.shape[2]} frames cannot be drawn by {self.title}; take one of a single picture, such "
                "as EmptySD3LatentImage makes (layers are of Qwen-Image-Layered, which is not supported)"
            )
        images = [x, *conditioning.references]
        for reference in conditioning.references:
            if reference.shape[0] not in (1, x.shape[0]):
                raise ValueError(f"a reference batch of {reference.shape[0]} does not fit a batch of {x.shape[0]}")
        options = conditioning.options
        return {
            "hidden_states": torch.cat([_tokens(image).expand(x.shape[0], -1, -1) for image in images], dim=1),
            "encoder_hidden_states": conditioning.context,
            "encoder_hidden_states_mask": conditioning.tensors.get("mask"),
            "timestep": timestep,
            "img_shapes": LatentImages(
                tuple((image.shape[2], image.shape[3], image.shape[4]) for image in images),
                options.get("reference_method"),
                options.get("positions", "comfyui"),
            ),
        }

    def picture_tokens(self, arguments: Mapping[str, Any]) -> int:
        return positions.picture_tokens(arguments["img_shapes"])

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        patches = output[:, : frames * rows * columns].reshape(batch, frames, rows, columns, -1, PATCH, PATCH)
        return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)[..., :height, :width]

    def heads(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"]

    def width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def context_width(self, config: Mapping[str, Any]) -> int:
        return config["joint_attention_dim"]

    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        # The peak is where queries and keys of both streams are rotated in fp32: 5 D are whole on every tp rank, 12 D
        # (q, k, v and their copies) are sharded over tp. From tp 2 on, what is whole in the MLP and around it is more.
        # On an H100, 1328 x 1328 took 0.35 GiB under Ulysses-2, 0.50 under TP-2 and 0.52 under TP-8, against 0.36, 0.53
        # and 0.53 here.
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        return max(25 * inner // 2, 5 * inner + 12 * inner // tp)


def _tokens(latent: Tensor) -> Tensor:
    """``[B, C, F, H, W] -> [B, F * H / 2 * W / 2, 4 C]``; an odd side is continued from its other end."""
    batch, channels, _, height, width = latent.shape
    if height % PATCH or width % PATCH:
        latent = functional.pad(latent, (0, width % PATCH, 0, height % PATCH, 0, 0), mode="circular")
    patches = latent.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, F, rows, 2, columns, 2]
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * PATCH**2)
