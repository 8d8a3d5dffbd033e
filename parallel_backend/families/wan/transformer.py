"""Wan's transformer: `WanTransformer3DModel` of diffusers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache.block_cache import BlockStack
from ...config import ParallelismConfig, Speed
from ...parallel.tensor import Model, Shard
from ..conditioning import Conditioning
from ..transformer import LatentLook, Transformer
from . import files

if TYPE_CHECKING:
    from ...parallel.attention import ShardedAttention
    from .entrance import WanEntrance

PATCH = 2
"""Latent positions to a token, along each side of a frame."""
MLP_UNITS = (128, 16)
"""Features of the MLP that stay together: as many as a matrix product works on at a time, or fewer of small models."""
FIRST_FRAME = "first_frame_channels"
"""Of the configuration, beside what diffusers knows: of a reference image that becomes a frame before the video."""
IMAGE_TOKENS = 257


class WanTransformer(Transformer):
    """Wan 2.1 and 2.2: 40 blocks of 40 heads x 128 (14B), 30 of 24 (5B) or of 12 (1.3B).

    One stream of a video's tokens with attention over all of it; text, and the image of Wan 2.1's I2V, come in by
    cross-attention. Images of I2V and controls of Fun are further channels of the latent.
    """

    title = "Wan"
    class_name = "WanTransformer3DModel"
    sequence_inputs = ()  # the model makes its sequence itself
    output_stream = 0
    block_stacks = (BlockStack("blocks", ("hidden_states",)),)
    imports = ("diffusers.models.transformers.transformer_wan", "parallel_backend.families.wan.entrance")
    latent_channels = 16
    latent_dims = 5
    latent_downscale = 8
    frame_downscale = 4
    pixel_multiple = 16
    timestep_scale = 1000.0
    dtype = "float16"
    conditioning_tensors = ("concat", "image", "first_frame", "more_frames")

    def build(self, config: Mapping[str, Any]) -> Model:
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel

        own = dict(config)
        channels = own.pop(FIRST_FRAME, None)
        if own.get("cross_attn_norm") is False or own.get("qk_norm", "rms_norm_across_heads") in (None, False):
            raise ValueError("a Wan transformer without norms around attention is not supported")
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(own).eval()
            if channels is not None:
                width = model.config.num_attention_heads * model.config.attention_head_dim
                size = tuple(model.config.patch_size[1:])
                model.ref_conv = nn.Conv2d(channels, width, kernel_size=size, stride=size)
                model.register_to_config(**{FIRST_FRAME: channels})
        has = model.config
        model.rope = WanRotaryPosEmbed(has.attention_head_dim, has.patch_size, has.rope_max_seq_len)  # its tables
        return model

    def is_file(self, keys: Collection[str]) -> bool:
        return files.is_file(keys)

    def check_metadata(self, metadata: Mapping[str, str]) -> None:
        files.check_metadata(metadata)

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return files.config_of(shapes)

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return files.rows_of(name)

    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        layout.check_heads(config["num_attention_heads"], f"this {self.title} transformer")

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        hidden, heads = config["ffn_dim"], config["num_attention_heads"]
        unit = next(unit for unit in (*MLP_UNITS, 1) if hidden % unit == 0 and hidden // unit >= heads)
        # The MLP need not divide over tp (13,824 features over 5): ranks hold a unit more or less.
        into, out = (Shard(style, units=hidden // unit, groups=1) for style in ("column", "row"))
        column, row, vector = Shard("column"), Shard("row"), Shard("vector")
        plan: dict[str, Shard] = {}
        for attention in ("attn1", "attn2"):
            plan |= {f"blocks.*.{attention}.{name}": column for name in ("to_q", "to_k", "to_v")}
            plan |= {f"blocks.*.{attention}.{name}": vector for name in ("norm_q", "norm_k")}
            plan[f"blocks.*.{attention}.to_out.0"] = row
        if config.get("added_kv_proj_dim") is not None:
            plan |= {f"blocks.*.attn2.{name}": column for name in ("add_k_proj", "add_v_proj")}
            plan["blocks.*.attn2.norm_added_k"] = vector
        plan |= {"blocks.*.ffn.net.0.proj": into, "blocks.*.ffn.net.2": out}
        plan["condition_embedder.time_proj"] = Shard("column", gather_output=True)
        return plan

    def install(self, transformer: Model, attention: ShardedAttention, speed: Speed) -> WanEntrance:
        from . import blocks, entrance

        return entrance.WanEntrance(transformer, attention.shards, blocks.install(transformer, attention, speed))

    def inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        given = conditioning.tensors
        if (more := given.get("more_frames")) is not None:
            x = torch.cat([x, more.to(x).expand(len(x), -1, -1, -1, -1)], dim=2)
        if (concat := given.get("concat")) is not None:
            x = torch.cat([x, concat.to(x).expand(len(x), -1, -1, -1, -1)], dim=1)
        first, image = given.get("first_frame"), given.get("image")
        beside = {
            "references": [_padded(latent.to(x)) for latent in conditioning.references],
            "first_frame": None if first is None else first.to(x),
        }
        return {
            "hidden_states": _padded(x),
            "timestep": timestep,
            "encoder_hidden_states": conditioning.context,
            "encoder_hidden_states_image": image,
            "attention_kwargs": {name: value for name, value in beside.items() if value is not None and len(value)},
        }

    def tokens(self, inputs: Mapping[str, Any]) -> int:
        beside = inputs.get("attention_kwargs") or {}
        latents = [inputs["hidden_states"], *(beside.get("references") or ())]
        latents += [beside["first_frame"]] if "first_frame" in beside else []
        return len(latents[0]) * sum(prod(latent.shape[2:]) // PATCH**2 for latent in latents)

    def picture_tokens(self, arguments: Mapping[str, Any]) -> int:
        local = (arguments.get("attention_kwargs") or {}).get("picture_tokens")
        return prod(arguments["hidden_states"].shape[2:]) // PATCH**2 if local is None else local

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        return output[:, :, :frames, :height, :width]

    def heads(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"]

    def width(self, config: Mapping[str, Any]) -> int:
        return config["num_attention_heads"] * config["attention_head_dim"]

    def context_width(self, config: Mapping[str, Any]) -> int:
        return config["text_dim"]

    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        # What is whole on a tp rank is the residual, the normed input and what a linear gives (3 D); sharded are
        # queries, keys and values, what they are packed to and what attention gives (7 D). The MLP, in pieces, holds
        # less.
        inner = self.width(config)
        return 3 * inner + 7 * inner // tp

    def latent_look(self, config: Mapping[str, Any]) -> LatentLook:
        channels = config.get("out_channels") or config.get("in_channels") or self.latent_channels
        downscale = self.latent_downscale if channels == self.latent_channels else 2 * self.latent_downscale
        return LatentLook(channels, downscale, PATCH * downscale)

    def concat_channels(self, config: Mapping[str, Any]) -> int:
        channels = self.latent_look(config).channels
        return config.get("in_channels", channels) - channels

    def example_tensors(self, config: Mapping[str, Any], latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        batch, _, *sizes = latent
        found: dict[str, tuple[int, ...]] = {}
        if beside := self.concat_channels(config):
            found["concat"] = (batch, beside, *sizes)
        if config.get("image_dim") is not None:
            found["image"] = (batch, IMAGE_TOKENS, config["image_dim"])
        return found

    def kept_bytes(self, config: Mapping[str, Any], tp: int, itemsize: int) -> int:
        from .entrance import MOST_ROWS

        return config["num_layers"] * 2 * MOST_ROWS * self.width(config) // tp * itemsize


def _padded(latent: Tensor) -> Tensor:
    """A latent ``[B, C, F, h, w]`` whose odd sides are continued from their other end."""
    height, width = latent.shape[-2:]
    if not (height % PATCH or width % PATCH):
        return latent
    return functional.pad(latent, (0, width % PATCH, 0, height % PATCH, 0, 0), mode="circular")
