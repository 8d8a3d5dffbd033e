"""FLUX.2 (Black Forest Labs): `Flux2Transformer2DModel` with a Mistral3 text encoder and `AutoencoderKLFlux2`."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...cache.block_cache import BlockStack
from ...config import ParallelismConfig, Speed
from ...parallel.tensor import Shard
from ..base import Conditioning, Family, Model, ReferenceModel
from ..text_encoders import mistral3 as flux2_text_file
from ..text_encoders.decoder import build_decoder, decoder_degree, decoder_plan, keys_beside, localize_decoder
from ..vaes import flux2 as flux2_vae_file
from . import files as flux2_single_file
from .drawing import Flux2Drawing

if TYPE_CHECKING:
    from ...parallel.attention import ShardedAttention
    from ...parallel.sequence import Entrance

REFERENCE_SPACING = 10
"""Distance of reference images along the time coordinate, as the model was trained."""


class Flux2(Family):
    """FLUX.2-dev: 8 double-stream and 48 single-stream blocks of 48 heads x 128, 32.2 B parameters.

    Double-stream blocks keep text and image apart but for attention; single-stream blocks run on both joined, text
    first. One modulation per stream type is shared by all blocks.
    """

    name = "flux2"
    title = "FLUX.2"
    models = ("FLUX.2-dev",)
    pipeline_classes = ("Flux2Pipeline",)
    transformer_class = "Flux2Transformer2DModel"
    text_encoder_class = "Mistral3ForConditionalGeneration"
    vae_class = "AutoencoderKLFlux2"
    sequence_inputs = (("encoder_hidden_states", "txt_ids"), ("hidden_states", "img_ids"))
    output_stream = 1
    block_stacks = (
        BlockStack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),
        BlockStack("single_transformer_blocks", ("hidden_states",)),
    )
    imports: Mapping[str, tuple[str, ...]] = {
        "transformer": ("diffusers.models.transformers.transformer_flux2", "parallel_backend.families.flux2.blocks"),
        "text_encoder": ("transformers.models.mistral3", "transformers.models.mistral.modeling_mistral"),
        "vae": (
            "diffusers.models.autoencoders.autoencoder_kl_flux2",
            "diffusers.pipelines.flux2.pipeline_flux2",
        ),
    }
    latent_channels = 128
    latent_downscale = pixel_multiple = 16
    conditioning_tensors = ("guidance",)
    conditioning_options: Mapping[str, tuple[str, ...]] = {"reference_method": ("index",)}
    reference_model = ReferenceModel(
        "FLUX.2-dev",
        {},
        # Mistral-Small-3.2-24B. The vision tower and the last ten layers play no part: the workers do not hold them.
        {
            "text_config": {
                "model_type": "mistral",
                "vocab_size": 131072,
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "num_hidden_layers": 40,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
            }
        },
        fp8_files=("flux2_dev_fp8mixed.safetensors", "mistral_3_small_flux2_fp8.safetensors"),
        fp8_bytes=35_500_000_000,
    )

    # The transformer.

    def build_transformer(self, config: Mapping[str, Any]) -> Model:
        from diffusers import Flux2Transformer2DModel

        with torch.device("meta"):
            return Flux2Transformer2DModel.from_config(dict(config)).eval()

    def is_single_file(self, keys: Collection[str]) -> bool:
        return flux2_single_file.MARK in keys

    def single_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return flux2_single_file.config_of(shapes)

    def single_file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return flux2_single_file.rows_of(name)

    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        layout.check_heads(config["num_attention_heads"], f"this {self.title} transformer")
        _, mlp = _widths(config)
        if mlp % layout.tp_size:
            fitting = [d for d in range(1, layout.tp_size) if mlp % d == 0 and config["num_attention_heads"] % d == 0]
            raise ValueError(
                f"the {mlp} features of this {self.title} transformer's MLP do not divide by tp_size={layout.tp_size} "
                f"({layout.describe()}); tp_size {', '.join(map(str, fitting))} would work"
            )

    def transformer_plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
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
        from . import blocks as flux2_blocks

        return flux2_blocks.install(transformer, attention, speed)

    def transformer_inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
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

    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        # The peak of a single-stream block is where queries and keys are rotated in fp32: residual, normed input and
        # conditioning (3 D) are whole on every tp rank; the fused projection (q, k, v, gate, up: 3 D + 2 MLP) and the
        # copies of q and k (9 D) are sharded over tp. At high tp a double-stream block takes over, which holds 8 D that
        # are not sharded. This is within 10 % of the allocations traced on the meta device; on an H200 FLUX.2-dev took
        # 1.2 GiB on one GPU and 0.6 GiB under Ulysses-2, against 1.1 and 0.55 here.
        inner, mlp = _widths(config)
        return max(8 * inner, 3 * inner + (3 * inner + 2 * mlp + 9 * inner) // tp)

    # Drawing.

    def drawing(self, pipeline_class: str) -> Flux2Drawing:
        return Flux2Drawing(self)

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        sigmas = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))
        scheduler.set_begin_index(0)

    # The text encoder.

    def text_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        # FLUX.2-dev reads layers 10, 20 and 30 of 40; a model with other layers says so in its configuration.
        return tuple(config.get("text_encoder_out_layers", (10, 20, 30)))

    def text_plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        return decoder_plan(config["text_config"])

    def text_degree(self, config: Mapping[str, Any], ranks: int) -> int:
        return decoder_degree(config["text_config"], ranks)

    def text_model(self, text_encoder: Model) -> Model:
        return text_encoder.model.language_model

    def build_text_model(self, config: Mapping[str, Any]) -> Model:
        from transformers import Mistral3Config

        full = Mistral3Config(**config).text_config
        available = full.num_hidden_layers
        used = max(self.text_layers(config))
        if used > available:
            raise ValueError(f"the text encoder has {available} layers, but layer {used} is asked for")
        full.num_hidden_layers = used
        if getattr(full, "layer_types", None):
            full.layer_types = full.layer_types[:used]
        model = build_decoder(full)
        # Frequencies are computed, not stored: they must be real. They stay in fp32 whatever the weights are.
        model.rotary_emb = type(model.rotary_emb)(full)
        if used < available:
            # The last of the hidden states is normed; it is taken from the middle here, so it must not be.
            model.norm = nn.Identity()
        return model

    def localize_text(self, text_model: Model) -> None:
        localize_decoder(text_model)

    def text_keys(self, names: Sequence[str]) -> dict[str, str]:
        return keys_beside(names, "embed_tokens.weight", without="vision")

    def encode_text(
        self,
        text_model: Model,
        ids: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        images: Tensor | None = None,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> Tensor:
        assert images is None, f"{self.title}'s text encoder does not look at images"
        states = text_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1)

    text_file_title = "Mistral 3 small (mistral_3_small_flux2_bf16.safetensors, or fp8)"
    text_file_tokenizer = flux2_text_file.TOKENIZER

    def is_text_file(self, keys: Collection[str]) -> bool:
        return flux2_text_file.is_text_file(keys)

    def text_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return flux2_text_file.text_config_of(shapes)

    # The VAE.

    def is_vae_file(self, keys: Collection[str]) -> bool:
        return flux2_vae_file.is_vae_file(keys)

    def vae_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return flux2_vae_file.vae_config_of(shapes)

    def vae_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return flux2_vae_file.vae_tensors(tensors)

    def vae_width(self, config: Mapping[str, Any]) -> int:
        # Five tensors of the widest full-size layer: a residual block's input, its norm, the activation of that and
        # what cuDNN's convolutions need beside them. On an H200, 1024 x 1024 took 4.4 to 4.9 GiB.
        return 5 * config["block_out_channels"][1]

    def decode_latent(self, vae: Model, latent: Tensor) -> Tensor:
        from diffusers import Flux2Pipeline

        mean, std = _latent_statistics(vae, latent)
        return vae.decode(Flux2Pipeline._unpatchify_latents(latent * std + mean), return_dict=False)[0]

    def encode_image(self, vae: Model, image: Tensor) -> Tensor:
        from diffusers import Flux2Pipeline

        latent = Flux2Pipeline._patchify_latents(vae.encode(image, return_dict=False)[0].mode())
        mean, std = _latent_statistics(vae, latent)
        return (latent - mean) / std


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


def _latent_statistics(vae: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent's channels, kept in the VAE's batch norm, each ``[1, C, 1, 1]``."""
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(like)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(like)
    return mean, std
