"""Random umT5 encoders in one file, as ComfyUI's users have them: small, with a tokenizer of SentencePiece's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .single_file import to_fp8, write

HEADS, HEAD, HIDDEN, MLP, LAYERS, BUCKETS = 8, 8, 64, 96, 3, 32
CONTROL, UNKNOWN, NORMAL = 3, 2, 1
"""Kinds of SentencePiece's pieces."""
SPECIAL = {"<pad>": CONTROL, "</s>": CONTROL, "<s>": CONTROL, "<unk>": UNKNOWN}
"""As umT5 counts them, from 0 on."""
WORDS = ["▁a", "▁the", "▁red", "▁circle", "▁on", "▁blue", "▁square", "▁cat", "er", "in", "re", "ing"]
LETTERS = ["▁", *map(chr, range(33, 127)), *"äöü猫犬"]
VOCAB = len(SPECIAL) + len(WORDS) + len(LETTERS)
KINDS = ("fp32", "fp16", "scaled_fp8", "comfy_quant")
"""How weights may be stored: the last two are fp8 in ComfyUI's layouts."""


def spiece_model() -> bytes:
    """A small ``spiece.model``: protobuf's bytes of SentencePiece's ModelProto, a unigram model with umT5's ids."""
    pieces = [*SPECIAL.items(), *((word, NORMAL) for word in WORDS + LETTERS)]
    model = b""
    for index, (piece, kind) in enumerate(pieces):
        score = 0.0 if kind != NORMAL else -1.0 - index / 100
        model += _field(1, _field(1, piece.encode()) + _tag(2, 5) + struct.pack("<f", score) + _number(3, kind))
    ids = {40: 3, 41: 2, 42: 1, 43: 0}  # of unk, bos, eos, pad
    trainer = _number(3, 1) + b"".join(_number(field, value) for field, value in ids.items())
    normalizer = _field(1, b"identity") + _number(3, 1) + _number(4, 1) + _number(5, 1)
    return model + _field(2, trainer) + _field(3, normalizer)


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def umt5_tensors(heads: int = HEADS, layers: int = LAYERS, mlp: int = MLP, hidden: int = HIDDEN) -> dict[str, Tensor]:
    """A state dict under ComfyUI's names, random, with its tokenizer; positions and attention matter in it."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale * columns**-0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    inner = heads * HEAD
    tensors = {"shared.weight": matrix(VOCAB, hidden, hidden**0.5), "encoder.final_layer_norm.weight": norm()}
    for index in range(layers):
        attention, gated = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        tensors |= {
            f"{attention}.SelfAttention.q.weight": matrix(inner, hidden, HEAD**-0.5),
            f"{attention}.SelfAttention.k.weight": matrix(inner, hidden),
            f"{attention}.SelfAttention.v.weight": matrix(inner, hidden),
            f"{attention}.SelfAttention.o.weight": matrix(hidden, inner),
            f"{attention}.SelfAttention.relative_attention_bias.weight": matrix(BUCKETS, heads, heads**0.5),
            f"{attention}.layer_norm.weight": norm(),
            f"{gated}.DenseReluDense.wi_0.weight": matrix(mlp, hidden),
            f"{gated}.DenseReluDense.wi_1.weight": matrix(mlp, hidden),
            f"{gated}.DenseReluDense.wo.weight": matrix(hidden, mlp),
            f"{gated}.layer_norm.weight": norm(),
        }
    tensors["spiece_model"] = torch.tensor(list(spiece_model()), dtype=torch.uint8)
    return tensors


def write_umt5(path: Path, kind: str = "fp32", **size: Any) -> Path:
    """Write a text encoder of one of `KINDS`."""
    tensors = umt5_tensors(**size)
    if kind in ("fp32", "fp16"):
        dtype = torch.float32 if kind == "fp32" else torch.float16
        return write(path, {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()})
    tables = {name: tensor.bfloat16() for name, tensor in tensors.items() if "relative" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in tables}
    stored, metadata = to_fp8(rest, kind, part=".block.")
    return write(path, {**stored, **tables}, metadata=metadata)


def comfy_config(heads: int = HEADS, layers: int = LAYERS, mlp: int = MLP, hidden: int = HIDDEN) -> dict[str, Any]:
    """What ComfyUI has to be told of the shapes of `umt5_tensors`, which it knows for the real encoder only."""
    return {"vocab_size": VOCAB, "d_model": hidden, "d_ff": mlp, "d_kv": HEAD, "num_heads": heads, "num_layers": layers}
