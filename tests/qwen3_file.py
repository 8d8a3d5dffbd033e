"""A small random Qwen3 in one file, which FLUX.2 klein and Z-Image take their contexts from in ComfyUI."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .single_file import write

HEAD, HIDDEN, LAYERS, VOCAB = 128, 64, 28, 151936
"""As many layers as FLUX.2 klein takes hidden states of, and the vocabulary that comes with ComfyUI."""
CONFIG = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
          "num_key_value_heads": 1}  # fmt: skip
"""What ComfyUI has to be told."""


def qwen3_tensors() -> dict[str, Tensor]:
    """A state dict."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int = HIDDEN) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(size: int = HIDDEN) -> Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    heads, kv_heads, mlp = (CONFIG[n] for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    tensors = {"model.embed_tokens.weight": matrix(VOCAB) * HIDDEN**0.5, "model.norm.weight": norm()}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix(heads * HEAD),
            f"{layer}.self_attn.k_proj.weight": matrix(kv_heads * HEAD),
            f"{layer}.self_attn.v_proj.weight": matrix(kv_heads * HEAD),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, heads * HEAD),
            f"{layer}.self_attn.q_norm.weight": norm(HEAD),
            f"{layer}.self_attn.k_norm.weight": norm(HEAD),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix(mlp),
            f"{layer}.mlp.up_proj.weight": matrix(mlp),
            f"{layer}.mlp.down_proj.weight": matrix(HIDDEN, mlp),
        }
    return tensors


def write_qwen3(path: Path) -> Path:
    """Write the file, 22 MB in bf16."""
    return write(path, {name: tensor.bfloat16() for name, tensor in qwen3_tensors().items()})
