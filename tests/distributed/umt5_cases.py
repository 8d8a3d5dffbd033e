"""What the ranks of the test world run: umT5 from its file, against transformers' own of the same weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from parallel_backend.config import ParallelismConfig
from parallel_backend.families.text_encoders.umt5 import TOKENIZER, Umt5
from parallel_backend.loading.quantized import read_quantization
from parallel_backend.loading.safetensors_reader import Weight, read_header, whole
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallelize import parallelize_text_encoder, shard_text_model, text_axes
from tests.errors import relative_error
from tests.umt5_file import VOCAB


def whole_encoder(path: Path, config: dict[str, object]) -> UMT5EncoderModel:
    """transformers' model with the weights of a file (in 8 bits: of what they stand for)."""
    tensors = load_file(path)
    tensors.pop(TOKENIZER)
    tensors.pop("scaled_fp8", None)
    scales = {key.removesuffix("scale_weight"): tensors.pop(key) for key in list(tensors) if "scale_weight" in key}
    state = {key: t.float() * scales.get(key.removesuffix("weight"), 1.0) for key, t in tensors.items()}
    model = UMT5EncoderModel(UMT5Config(**config)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) in (([], []), (["encoder.embed_tokens.weight"], []))
    model.tie_weights()
    return model


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of which one is padded, longer than the positions that are told apart one by one, and all ranges."""
    ids = torch.randint(1, VOCAB, (2, 150), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    return ids * mask, mask


def encode(mesh: ParallelMesh, layout: ParallelismConfig, path: str, fp8: str = "cast") -> dict[str, float]:
    """The error of this rank's context, and what it holds."""
    keys = read_header(Path(path))
    kind, config = Umt5(), Umt5().file_config({key: tensor.shape for key, tensor in keys.items()})
    axis, replicas = text_axes(kind, config, mesh)
    model = kind.build(config)
    table = shard_text_model(model, kind, config, axis)
    quantization = read_quantization(Path(path), keys, "")
    weights = {
        name: Weight(whole(keys[key]).pieces, quantization.scale(key.rpartition(".")[0]))
        for name, key in kind.keys(list(keys)).items()
    }
    held = load_weights(
        model, weights, table, device=torch.device("cpu"), dtype=torch.float32, replicas=replicas, fp8=fp8
    )
    ids, mask = _inputs()
    context = kind.encode(model, ids, mask, kind.layers(config))
    expected = whole_encoder(Path(path), config)(input_ids=ids, attention_mask=mask).last_hidden_state
    return {
        "error": relative_error(context[mask == 1], expected[mask == 1]),
        "masked": float(context[mask == 0].abs().max()),
        "held": held,
        "degree": axis.degree,
        "copies": replicas.degree,
        "tables": model.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape[1],
    }


def whole_and_sharded(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> float:
    """The error of transformers' own forward on a text encoder that was sharded when it was loaded already."""
    keys = read_header(Path(path))
    config = Umt5().file_config({key: tensor.shape for key, tensor in keys.items()})
    model = whole_encoder(Path(path), config)
    ids, mask = _inputs()
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    parallelize_text_encoder(model, Umt5(), mesh, "text_encoder")
    return relative_error(model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)
