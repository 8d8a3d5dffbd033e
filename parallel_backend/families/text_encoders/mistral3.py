"""Mistral 3, the text encoder of FLUX.2: three of its hidden states make the context; its file as ComfyUI has it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...parallel.tensor import Model, Shard
from ..text_encoder import TextEncoder
from .decoder import build_decoder, decoder_degree, decoder_plan, keys_beside, localize_decoder

TOKENIZER = "tekken_model"
"""The tensor with the tokenizer: Mistral's ``tekken.json`` as bytes."""
MARKS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.post_attention_layernorm.weight")
NOT_THIS = ("self_attn.q_norm.weight", "self_attn.k_proj.bias", "pre_feedforward_layernorm.weight")
"""Of the first layer: what Qwen and Gemma have, and Mistral lacks."""

# What shapes do not tell, as of Mistral-Small-3.2-24B.
HEAD = 128
ROPE_THETA = 1e9
EPS = 1e-5
LAYERS = (10, 20, 30)
"""Hidden states that make the context."""


class Mistral3(TextEncoder):
    """Mistral-Small-3.2-24B, of which the vision tower and the last ten layers play no part."""

    title = "Mistral 3"
    class_name = "Mistral3ForConditionalGeneration"
    imports = ("transformers.models.mistral3", "transformers.models.mistral.modeling_mistral")

    def layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        # FLUX.2-dev reads layers 10, 20 and 30 of 40; a model with other layers says so in its configuration.
        return tuple(config.get("text_encoder_out_layers", LAYERS))

    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        return decoder_plan(config["text_config"])

    def degree(self, config: Mapping[str, Any], ranks: int) -> int:
        return decoder_degree(config["text_config"], ranks)

    def text_model(self, text_encoder: Model) -> Model:
        return text_encoder.model.language_model

    def build(self, config: Mapping[str, Any]) -> Model:
        from transformers import Mistral3Config

        full = Mistral3Config(**config).text_config
        available = full.num_hidden_layers
        used = max(self.layers(config))
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

    def localize(self, text_model: Model) -> None:
        localize_decoder(text_model)

    def keys(self, names: Sequence[str]) -> dict[str, str]:
        return keys_beside(names, "embed_tokens.weight", without="vision")

    def encode(
        self,
        text_model: Model,
        ids: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        images: Tensor | None = None,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> Tensor:
        assert images is None, "its vision tower is not loaded"
        states = text_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[layer] for layer in layers], dim=-1)

    file_title = "Mistral 3 small (mistral_3_small_flux2_bf16.safetensors, or fp8)"
    file_tokenizer = TOKENIZER

    def is_file(self, keys: Collection[str]) -> bool:
        return _is_file(keys)

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return _config_of(shapes)


def _is_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of a Mistral text model that brings its tokenizer along, or should have."""
    return all(key in keys for key in MARKS) and not any(f"model.layers.0.{key}" in keys for key in NOT_THIS)


def _config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of `Mistral3ForConditionalGeneration`, as far as its text model goes.

    Files may end after the last layer that is used ("pruned").

    Args:
        shapes: key -> shape.

    Raises:
        ValueError: a tensor that it says is missing, or of a shape that cannot be.
    """

    def shape(key: str) -> tuple[int, int]:
        found = shapes.get(f"{key}.weight")
        if found is None:
            raise ValueError(f"there is no tensor {key}.weight; the file is incomplete")
        if len(found) != 2 or 0 in found:
            raise ValueError(f"{key}.weight has shape {list(found)}, where 2 dims are expected; the file is damaged")
        return found[0], found[1]

    first = "model.layers.0"
    vocab, hidden = shape("model.embed_tokens")
    heads, kv_heads = (shape(f"{first}.self_attn.{name}_proj")[0] for name in "qk")
    if heads % HEAD or kv_heads % HEAD:
        raise ValueError(f"{first} has {heads} query and {kv_heads} key features, which are no heads of {HEAD}")
    layers = {int(match[1]) for key in shapes if (match := re.match(r"model\.layers\.(\d+)\.", key))}
    missing = set(range(max(LAYERS))) - layers
    if missing:
        raise ValueError(
            f"there are no tensors of model.layers.{min(missing)}, of {max(LAYERS)} layers that FLUX.2 uses; the file "
            "is incomplete or of another model"
        )
    return {
        "text_config": {
            "model_type": "mistral",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": shape(f"{first}.mlp.gate_proj")[0],
            # A file that ends with the last layer that is used was cut from a model with more, of which at least one is
            # told of here: that layer's output is not normed, whether or not the file has kept the final norm.
            "num_hidden_layers": max(len(layers), max(LAYERS) + 1),
            "num_attention_heads": heads // HEAD,
            "num_key_value_heads": kv_heads // HEAD,
            "head_dim": HEAD,
            "rms_norm_eps": EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "sliding_window": None,
        },
        "text_encoder_out_layers": list(LAYERS),
    }
