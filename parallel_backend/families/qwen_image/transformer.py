"""Qwen-Image and Qwen-Image-Edit (Alibaba): `QwenImageTransformer2DModel` with Qwen2.5-VL and its own VAE."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...cache.block_cache import BlockStack
from ...config import ParallelismConfig, Speed
from ...parallel.tensor import Shard
from ..base import Conditioning, Family, Model, ReferenceModel, VisionImage
from ..file_shapes import count_blocks, shape_of
from ..text_encoders import qwen25_vl as qwen_image_text
from ..text_encoders.decoder import decoder_degree, decoder_plan, keys_beside, localize_decoder
from . import positions as qwen_image_positions
from .drawing import DRAWINGS, PATCH, QwenImageDrawing
from .positions import LatentImages, QwenEntrance

if TYPE_CHECKING:
    from ...parallel.attention import ShardedAttention

MARK = "transformer_blocks.0.img_mod.1.weight"
ZERO_MARK = "__index_timestep_zero__"
"""An empty tensor in files of models that take references as at timestep 0 (Qwen-Image-Edit-2511)."""
METHODS = ("index", "index_timestep_zero", "negative_index", "offset")


class QwenImage(Family):
    """Qwen-Image: 60 double-stream blocks of 24 heads x 128, 20.4 B parameters, a third of them modulation.

    Prompts keep their own length. The edit models take references behind the picture's tokens, and the text encoder
    looks at them too.
    """

    name = "qwen_image"
    title = "Qwen-Image"
    models = ("Qwen-Image", "Qwen-Image-2512", "Qwen-Image-Edit", "Qwen-Image-Edit-2509", "Qwen-Image-Edit-2511")
    pipeline_classes = ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    transformer_class = "QwenImageTransformer2DModel"
    text_encoder_class = "Qwen2_5_VLForConditionalGeneration"
    vae_class = "AutoencoderKLQwenImage"
    sequence_inputs = (("encoder_hidden_states",), ("hidden_states",))
    output_stream = 1
    block_stacks = (BlockStack("transformer_blocks", ("encoder_hidden_states", "hidden_states")),)
    imports: Mapping[str, tuple[str, ...]] = {
        "transformer": (
            "diffusers.models.transformers.transformer_qwenimage",
            "parallel_backend.families.qwen_image.blocks",
        ),
        "text_encoder": ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",),
        "vae": ("diffusers.models.autoencoders.autoencoder_kl_qwenimage",),
    }
    latent_channels = 16
    latent_dims = 5
    latent_downscale = 8
    pixel_multiple = 16
    conditioning_tensors = ("mask",)
    conditioning_options: Mapping[str, tuple[str, ...]] = {
        "reference_method": METHODS,
        "positions": ("comfyui", "diffusers"),
    }
    reference_model = ReferenceModel(
        "Qwen-Image",
        {},
        # Qwen2.5-VL-7B; the vision tower is there for images only.
        {
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
            }
        },
        fp8_files=("qwen_image_fp8_e4m3fn.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors"),
        fp8_bytes=20_430_000_000,
    )

    # The transformer.

    def build_transformer(self, config: Mapping[str, Any]) -> Model:
        if config.get("use_layer3d_rope") or config.get("use_additional_t_cond"):
            raise ValueError(
                "this is Qwen-Image-Layered, which is not supported; Qwen-Image and Qwen-Image-Edit (2509, 2511) are"
            )
        from diffusers import QwenImageTransformer2DModel

        # Frequencies of the positions are tables rather than buffers, so they are made where they are used.
        with torch.device("meta"):
            return QwenImageTransformer2DModel.from_config(dict(config)).eval()

    def is_single_file(self, keys: Collection[str]) -> bool:
        return "txt_norm.weight" in keys and MARK in keys

    def single_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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

    single_file_marks = (ZERO_MARK,)

    def single_file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return ((name, 0, 1),)  # ComfyUI's names are diffusers'

    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        layout.check_heads(config["num_attention_heads"], f"this {self.title} transformer")

    def transformer_plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
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
        from . import blocks as qwen_image_blocks

        forwards = qwen_image_blocks.install(transformer, attention, speed)
        return QwenEntrance(transformer, attention.shards, forwards)

    def transformer_inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
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
        return qwen_image_positions.picture_tokens(arguments["img_shapes"])

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        batch, _, frames, height, width = x.shape
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        patches = output[:, : frames * rows * columns].reshape(batch, frames, rows, columns, -1, PATCH, PATCH)
        return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)[..., :height, :width]

    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        # The peak is where queries and keys of both streams are rotated in fp32: 5 D are whole on every tp rank, 12 D
        # (q, k, v and their copies) are sharded over tp. From tp 2 on, what is whole in the MLP and around it is more.
        # On an H100, 1328 x 1328 took 0.35 GiB under Ulysses-2, 0.50 under TP-2 and 0.52 under TP-8, against 0.36, 0.53
        # and 0.53 here.
        inner = config["num_attention_heads"] * config["attention_head_dim"]
        return max(25 * inner // 2, 5 * inner + 12 * inner // tp)

    # Drawing.

    def drawing(self, pipeline_class: str) -> QwenImageDrawing:
        return DRAWINGS[pipeline_class](self)

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

        config = scheduler.config
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        scheduler.set_begin_index(0)

    # The text encoder.

    def text_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (_text(config)["num_hidden_layers"],)

    def text_plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        return decoder_plan(_text(config))

    def text_degree(self, config: Mapping[str, Any], ranks: int) -> int:
        return decoder_degree(_text(config), ranks)

    def text_model(self, text_encoder: Model) -> Model:
        return text_encoder.model.language_model

    def build_text_model(self, config: Mapping[str, Any]) -> Model:
        return qwen_image_text.build_text_model(config)

    def localize_text(self, text_model: Model) -> None:
        localize_decoder(text_model)

    def text_keys(self, names: Sequence[str]) -> dict[str, str]:
        return keys_beside(names, "embed_tokens.weight", without="vis")

    has_vision_tower = True

    def build_vision(self, config: Mapping[str, Any]) -> Model:
        return qwen_image_text.build_vision(config)

    def vision_keys(self, names: Sequence[str]) -> dict[str, str]:
        return keys_beside(names, "patch_embed.proj.weight")

    def encode_images(self, vision: Model, images: Sequence[VisionImage]) -> Tensor:
        return qwen_image_text.encode_images(vision, images)

    def encode_text(
        self,
        text_model: Model,
        ids: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        images: Tensor | None = None,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> Tensor:
        return qwen_image_text.encode_text(text_model, ids, mask, images, grids)

    text_file_title = "Qwen2.5-VL 7B (qwen_2.5_vl_7b.safetensors, or fp8)"
    text_file_tokenizer = None

    def is_text_file(self, keys: Collection[str]) -> bool:
        return qwen_image_text.is_text_file(keys)

    def text_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return qwen_image_text.file_config(shapes)

    # The VAE.

    def vae_width(self, config: Mapping[str, Any]) -> int:
        # On an H100, decoding took 8.3 GiB for 1024 x 1024 and 13.9 for 1328 x 1328 with 96 features: convolutions in
        # time keep padded copies of what they saw.
        return 22 * config["base_dim"] * config["dim_mult"][0]

    def decode_latent(self, vae: Model, latent: Tensor) -> Tensor:
        mean, std = _latent_statistics(vae, latent)
        return vae.decode(latent * std + mean, return_dict=False)[0]

    def encode_image(self, vae: Model, image: Tensor) -> Tensor:
        latent = vae.encode(image, return_dict=False)[0].mode()
        mean, std = _latent_statistics(vae, latent)
        return (latent - mean) / std


def _tokens(latent: Tensor) -> Tensor:
    """``[B, C, F, H, W] -> [B, F * H / 2 * W / 2, 4 C]``; an odd side is continued from its other end."""
    batch, channels, _, height, width = latent.shape
    if height % PATCH or width % PATCH:
        latent = functional.pad(latent, (0, width % PATCH, 0, height % PATCH, 0, 0), mode="circular")
    patches = latent.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, F, rows, 2, columns, 2]
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * PATCH**2)


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part of a configuration, with all its values; older files have it flat."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(**config).text_config.to_dict()


def _latent_statistics(vae: Model, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent's channels, each ``[1, C, 1, 1, 1]``."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like), std.to(like)
