"""Random text encoders of FLUX.2 in one file, as ComfyUI's users have them: small, with all layers and a tokenizer."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .single_file import to_fp8, write

HEAD = 128
"""Width of a head; no shape says it."""
HIDDEN = 64
"""Three hidden states make a context as wide as `single_file.TEXT`."""
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>", 17: "[SYSTEM_PROMPT]",
           18: "[/SYSTEM_PROMPT]"}  # fmt: skip
KINDS = ("fp32", "bf16", "metadata", "comfy_quant", "scaled_fp8")
"""How weights may be stored: the last three are fp8 in ComfyUI's layouts."""
SPECIAL_COUNT = 20
MERGED = [" a", " the", "er", "in", " red", " circle", "re", "on"]
VOCAB = SPECIAL_COUNT + 256 + len(MERGED)


def tekken() -> bytes:
    """A small ``tekken.json``: all bytes, and a few longer tokens."""
    words = [bytes([value]) for value in range(256)] + [word.encode() for word in MERGED]
    return json.dumps(
        {
            "config": {"default_vocab_size": VOCAB, "default_num_special_tokens": SPECIAL_COUNT, "pattern": ""},
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
                for rank, word in enumerate(words)
            ],
            "special_tokens": [
                {"rank": rank, "token_str": SPECIAL.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
                for rank in range(SPECIAL_COUNT)
            ],
        }
    ).encode()


def text_tensors(layers: int = 30, heads: int = 4, kv_heads: int = 2, hidden: int = HIDDEN) -> dict[str, Tensor]:
    """A state dict, random, with its tokenizer; one of 30 layers is "pruned" and has no final norm."""
    generator = torch.Generator().manual_seed(0)
    inner, kv, mlp = heads * HEAD, kv_heads * HEAD, 3 * hidden // 2

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(hidden, generator=generator)

    tensors = {"model.embed_tokens.weight": matrix(VOCAB, hidden) * hidden**0.5}
    for index in range(layers):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(inner, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, inner),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix(mlp, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(mlp, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, mlp),
        }
    if layers > 30:
        tensors["model.norm.weight"] = norm()
    tensors["tekken_model"] = torch.tensor(list(tekken()), dtype=torch.uint8)
    return tensors


def text_to_fp8(tensors: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The layers' linears in 8 bits, in one of ComfyUI's layouts (see `single_file.to_fp8`), the rest in bf16."""
    return to_fp8(tensors, layout, part=".layers.")


def write_text(path: Path, kind: str = "fp32", **size: Any) -> Path:
    """Write a text encoder of one of `KINDS`."""
    tensors = text_tensors(**size)
    if kind in ("fp32", "bf16"):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        return write(path, {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()})
    stored, metadata = text_to_fp8(tensors, kind)
    return write(path, stored, metadata=metadata)


def comfy_config(**size: Any) -> dict[str, int]:
    """What ComfyUI has to be told of the shapes of `text_tensors`, which it knows for the real encoder only."""
    heads, kv_heads, hidden = size.get("heads", 4), size.get("kv_heads", 2), size.get("hidden", HIDDEN)
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden // 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
