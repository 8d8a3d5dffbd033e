"""What the ranks of the test world run: a text encoder loaded from its file, against transformers' own of the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralModel

from parallel_backend.config import ParallelismConfig
from parallel_backend.loading.text_encoder_file import open_text_encoder_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallelize import shard_text_model, text_axes
from tests.errors import relative_error

from .loading_cases import counting_reads


def whole_encoder(path: Path) -> MistralModel:
    """transformers' model with a file's weights (not in fp8), each layer of the file in it.

    Args:
        path: of a file in fp32, whose heads are 128 wide.
    """
    weights = {key.removeprefix("model."): tensor for key, tensor in load_file(path).items() if key != "tekken_model"}
    vocab, hidden = weights["embed_tokens.weight"].shape
    config = MistralConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=weights["layers.0.mlp.up_proj.weight"].shape[0],
        num_hidden_layers=sum(key.endswith("up_proj.weight") for key in weights),
        num_attention_heads=weights["layers.0.self_attn.q_proj.weight"].shape[0] // 128,
        num_key_value_heads=weights["layers.0.self_attn.k_proj.weight"].shape[0] // 128,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        sliding_window=None,
    )
    model = MistralModel(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing in ([], ["norm.weight"])
    return model


def layer_outputs(model: MistralModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What leaves layers 10, 20 and 30 (counted from 1), side by side: ``[B, L, 3 * hidden]``.

    They are caught where they leave: of transformers' hidden states the last one is normed.
    """
    caught = {}
    for number in (10, 20, 30):
        model.layers[number - 1].register_forward_hook(
            lambda _, __, output, number=number: caught.__setitem__(
                number, output[0] if isinstance(output, tuple) else output
            )
        )
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    return torch.cat([caught[number] for number in (10, 20, 30)], dim=-1)


def encode(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, float]:
    """The error of this rank's context, and the bytes that it read and holds."""
    source = open_text_encoder_file(Path(path))
    family, config = source.family, source.text_config
    axis, replicas = text_axes(family.needs_text_encoder(), config, mesh)
    model = family.needs_text_encoder().build(config)
    table = shard_text_model(model, family.needs_text_encoder(), config, axis)
    with counting_reads(path) as read:
        held = load_weights(
            model, source.weights("text_encoder"), table,
            device=torch.device("cpu"), dtype=torch.float32, replicas=replicas,
        )  # fmt: skip
    ids = torch.randint(3, 250, (2, 37), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    context = family.needs_text_encoder().encode(model, ids, mask, family.needs_text_encoder().layers(config))
    expected = layer_outputs(whole_encoder(Path(path)), ids, mask)
    return {
        "error": relative_error(context, expected),
        "read": sum(read),
        "held": held,
        "degree": axis.degree,
        "copies": replicas.degree,
    }
