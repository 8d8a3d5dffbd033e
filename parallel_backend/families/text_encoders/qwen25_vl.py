"""Qwen2.5-VL, the text encoder of Qwen-Image: its file as ComfyUI has it, its positions, and its vision tower."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...parallel.tensor import Model, Shard
from ..conditioning import VisionImage
from ..file_shapes import count_blocks, shape_of
from ..text_encoder import TextEncoder
from .decoder import ATTENTION, build_decoder, decoder_degree, decoder_plan, keys_beside, localize_decoder

VISION_MARK = "visual.patch_embed.proj.weight"
MARKS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.bias")

# What shapes do not tell, as of Qwen2.5-VL-7B.
HEAD, VISION_HEAD = 128, 80
MERGE = 2
"""Patches that the vision tower joins along each side."""
_TEXT = {
    "max_position_embeddings": 128_000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
}
_VISION = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": MERGE,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_IDS = {"image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653}


class Qwen25VL(TextEncoder):
    """Qwen2.5-VL-7B, whose vision tower is there for images only."""

    title = "Qwen2.5-VL"
    class_name = "Qwen2_5_VLForConditionalGeneration"
    imports = ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",)

    def layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        return (_text(config)["num_hidden_layers"],)

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        return decoder_plan(_text(config))

    def degree(self, config: Mapping[str, Any], ranks: int) -> int:
        return decoder_degree(_text(config), ranks)

    def text_model(self, text_encoder: Model) -> Model:
        return text_encoder.model.language_model

    def build(self, config: Mapping[str, Any]) -> Model:
        return _build_text_model(config)

    def localize(self, text_model: Model) -> None:
        localize_decoder(text_model)

    def keys(self, names: Sequence[str]) -> dict[str, str]:
        return keys_beside(names, "embed_tokens.weight", without="vis")

    has_vision_tower = True

    def build_vision(self, config: Mapping[str, Any]) -> Model:
        return _build_vision(config)

    def vision_keys(self, names: Sequence[str]) -> dict[str, str]:
        return keys_beside(names, "patch_embed.proj.weight")

    def encode_images(self, vision: Model, images: Sequence[VisionImage]) -> Tensor:
        return _encode_images(vision, images)

    def encode(
        self,
        text_model: Model,
        ids: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        images: Tensor | None = None,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> Tensor:
        return _encode_text(text_model, ids, mask, images, grids)

    file_title = "Qwen2.5-VL 7B (qwen_2.5_vl_7b.safetensors, or fp8)"
    file_tokenizer = None

    def is_file(self, keys: Collection[str]) -> bool:
        return _is_file(keys)

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return _file_config(shapes)


def _is_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of a Qwen2.5 text model, which alone has biases in its attention."""
    return all(key in keys for key in MARKS)


def _file_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of `Qwen2_5_VLForConditionalGeneration`, read off the shapes in its file.

    Raises:
        ValueError: a tensor that it says is missing, or of a shape that cannot be.
    """
    vocab, hidden = shape_of(shapes, "model.embed_tokens.weight")
    first = "model.layers.0"
    heads, kv_heads = (shape_of(shapes, f"{first}.self_attn.{name}_proj.weight")[0] for name in "qk")
    if heads != hidden or kv_heads % HEAD or heads % HEAD:
        raise ValueError(f"{first} has {heads} query and {kv_heads} key features, which are no heads of {HEAD}")
    config: dict[str, Any] = {
        "text_config": {
            **_TEXT,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": shape_of(shapes, f"{first}.mlp.gate_proj.weight")[0],
            "num_hidden_layers": count_blocks(shapes, "model.layers"),
            "num_attention_heads": heads // HEAD,
            "num_key_value_heads": kv_heads // HEAD,
        },
        **_IDS,
    }
    if VISION_MARK in shapes:
        width = shape_of(shapes, VISION_MARK, dims=5)[0]
        config["vision_config"] = {
            **_VISION,
            "depth": count_blocks(shapes, "visual.blocks"),
            "hidden_size": width,
            "num_heads": width // VISION_HEAD,
            "intermediate_size": shape_of(shapes, "visual.blocks.0.mlp.gate_proj.weight")[0],
            "out_hidden_size": shape_of(shapes, "visual.merger.mlp.2.weight")[0],
        }
    return config


def _build_text_model(config: Mapping[str, Any]) -> Model:
    """The language model, with weights on the meta device."""
    from transformers import Qwen2_5_VLConfig

    full = Qwen2_5_VLConfig(**config)
    model = build_decoder(full.text_config)
    # Frequencies are computed, not stored: they must be real.
    model.rotary_emb = type(model.rotary_emb)(full.text_config)
    model.image_token_id = full.image_token_id
    return model


def _build_vision(config: Mapping[str, Any]) -> Model:
    """The vision tower, with weights on the meta device."""
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    vision = Qwen2_5_VLConfig(**config).vision_config
    with torch.device("meta"):
        model = Qwen2_5_VisionTransformerPretrainedModel._from_config(vision, attn_implementation=ATTENTION)
    frequencies = model.rotary_pos_emb
    # transformers before 5.18 made them for a width.
    model.rotary_pos_emb = type(frequencies)(frequencies.dim if hasattr(frequencies, "dim") else vision)
    return model


def _encode_images(vision: Model, images: Sequence[VisionImage]) -> Tensor:
    """Features of all images' merged patches, ``[N, hidden]``."""
    for image in images:
        if len(image.patches) != torch.Size(image.grid).numel():
            raise ValueError(f"{len(image.patches)} patches do not make a grid of {image.grid}")
    patches = torch.cat([image.patches for image in images]).to(vision.dtype)
    grids = torch.tensor([image.grid for image in images], device=patches.device)
    return vision(patches, grid_thw=grids).pooler_output


def _encode_text(
    text_model: Model, ids: Tensor, mask: Tensor, images: Tensor | None, grids: Sequence[tuple[int, int, int]]
) -> Tensor:
    """The last, normed hidden state ``[B, L, hidden]``; images stand in the places of their tokens."""
    embeds = text_model.embed_tokens(ids)
    positions = None
    if images is not None:
        places = ids == text_model.image_token_id
        if int(places.sum()) != len(images):
            raise ValueError(
                f"the prompt has room for {int(places.sum())} image tokens, but the images make {len(images)}"
            )
        embeds = embeds.masked_scatter(places.unsqueeze(-1), images.to(embeds))
        positions = image_positions(ids.cpu(), mask.cpu(), grids, text_model.image_token_id).to(ids.device)
    return text_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def image_positions(ids: Tensor, mask: Tensor, grids: Sequence[tuple[int, int, int]], image_token_id: int) -> Tensor:
    """Positions in time, rows and columns of each token, ``[3, B, L]`` (M-RoPE, Qwen2-VL, arXiv:2409.12191).

    Text counts up in all three alike; an image is a grid of its own, and the text after it goes on behind its longer
    side. Masked tokens have no position. Some versions of diffusers with transformers 5 leave the grids out.
    """
    positions = torch.zeros(3, *ids.shape, dtype=torch.long)
    remaining = iter(grids)
    for row, (tokens, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
        columns = kept.nonzero().flatten()
        is_image = (tokens[columns] == image_token_id).tolist()
        at = position = 0
        while at < len(columns):
            if is_image[at]:
                frames, height, width = next(remaining)
                axes = [torch.arange(count) for count in (frames, height // MERGE, width // MERGE)]
                coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
                step = max(height, width) // MERGE
            else:
                coordinates, step = torch.zeros(3, 1, dtype=torch.long), 1
            count = coordinates.shape[1]
            positions[:, row, columns[at : at + count]] = position + coordinates
            at, position = at + count, position + step
    return positions


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part of a configuration, with all its values; older files have it flat."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(**config).text_config.to_dict()
