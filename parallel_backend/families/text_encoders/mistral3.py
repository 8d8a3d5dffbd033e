"""FLUX.2's text encoder in one file, as ComfyUI has it: recognising it, and its configuration from its shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

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


def is_text_file(keys: Collection[str]) -> bool:
    """Whether a file's keys are those of a Mistral text model that brings its tokenizer along, or should have."""
    return all(key in keys for key in MARKS) and not any(f"model.layers.0.{key}" in keys for key in NOT_THIS)


def text_config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
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
