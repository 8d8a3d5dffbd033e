"""Z-Image's transformer: `ZImageTransformer2DModel` of diffusers."""

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
from ..transformer import Transformer
from . import files

if TYPE_CHECKING:
    from ...parallel.attention import ShardedAttention
    from .blocks import ZImageEntrance

PATCH = 2
MLP_UNITS = (128, 16)
"""Features of the MLP that stay together: as many as a matrix product works on at a time, or fewer of small models."""


class ZImageTransformer(Transformer):
    """Z-Image: 30 single-stream blocks of 30 heads x 128, 6.2 B parameters, and two that refine each stream before.

    Text and image are padded to multiples of 32 with learned tokens. The timestep counts from noise to picture.
    """

    title = "Z-Image"
    class_name = "ZImageTransformer2DModel"
    sequence_inputs = ()  # the model makes its sequences itself
    output_stream = 0
    block_stacks = (BlockStack("layers", ("x",)),)
    imports = ("diffusers.models.transformers.transformer_z_image", "parallel_backend.families.z_image.blocks")
    latent_channels = 16
    latent_downscale = 8
    pixel_multiple = 16
    file_marks = ("norm_final.weight",)  # of Lumina 2's code, used by nobody

    def build(self, config: Mapping[str, Any]) -> Model:
        if config.get("siglip_feat_dim") is not None:
            raise ValueError("this is Z-Image-Omni, which is not supported; Z-Image and Z-Image-Turbo are")
        from diffusers import ZImageTransformer2DModel

        with torch.device("meta"):
            return ZImageTransformer2DModel.from_config(dict(config)).eval()

    def is_file(self, keys: Collection[str]) -> bool:
        return files.is_file(keys)

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return files.config_of(shapes)

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return files.rows_of(name)

    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        layout.check_heads(config["n_heads"], f"this {self.title} transformer")
        if config["n_kv_heads"] != config["n_heads"]:
            raise ValueError(f"a {self.title} transformer with fewer heads of keys than of queries is not supported")

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        hidden = int(config["dim"] / 3 * 8)
        unit = next(unit for unit in (*MLP_UNITS, 1) if hidden % unit == 0 and hidden // unit >= config["n_heads"])
        # The MLP need not divide over tp (10,240 features over 3): ranks hold a unit more or less.
        into, out = (Shard(style, units=hidden // unit, groups=1) for style in ("column", "row"))
        column, row = Shard("column"), Shard("row")
        plan: dict[str, Shard] = {}
        for blocks in ("layers", "noise_refiner", "context_refiner"):
            plan |= {f"{blocks}.*.attention.{name}": column for name in ("to_q", "to_k", "to_v")}
            plan[f"{blocks}.*.attention.to_out.0"] = row
            plan |= {f"{blocks}.*.feed_forward.w1": into, f"{blocks}.*.feed_forward.w3": into}
            plan[f"{blocks}.*.feed_forward.w2"] = out
        for blocks in ("layers", "noise_refiner"):
            plan[f"{blocks}.*.adaLN_modulation.0"] = Shard("column", gather_output=True)
        return plan

    def install(self, transformer: Model, attention: ShardedAttention, speed: Speed) -> ZImageEntrance:
        from . import blocks

        return blocks.ZImageEntrance(transformer, attention, speed)

    def inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        if conditioning.references:
            raise ValueError(f"{self.title} takes no reference latents (Z-Image-Omni, which does, is not supported)")
        height, width = x.shape[-2:]
        if height % PATCH or width % PATCH:
            x = functional.pad(x, (0, width % PATCH, 0, height % PATCH), mode="circular")
        context = conditioning.context.expand(len(x), -1, -1)
        return {"x": list(x.unsqueeze(2)), "t": 1 - timestep.expand(len(x)), "cap_feats": list(context)}

    def tokens(self, inputs: Mapping[str, Any]) -> int:
        from .blocks import tokens_of

        return sum(tokens_of(x) for x in inputs["x"]) + sum(len(text) for text in inputs["cap_feats"])

    def picture_tokens(self, arguments: Mapping[str, Any]) -> int:
        from .blocks import LocalLatents, tokens_of

        latents = arguments["x"]
        return latents.picture_tokens if isinstance(latents, LocalLatents) else tokens_of(latents[0])

    def prediction(self, output: Any, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return -torch.stack(output).squeeze(2)[..., :height, :width]

    def heads(self, config: Mapping[str, Any]) -> int:
        return config["n_heads"]

    def width(self, config: Mapping[str, Any]) -> int:
        return config["dim"]

    def context_width(self, config: Mapping[str, Any]) -> int:
        return config["cap_feat_dim"]

    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        # What is whole on a tp rank is the residual, the normed input and what a linear gives (5 D); sharded are either
        # queries, keys and values with their copies in fp32 (12 D), or three times the MLP's 8/3 D.
        return 5 * config["dim"] + 12 * config["dim"] // tp
