"""LoRA files of small transformers in the spellings of ComfyUI, diffusers and peft, and what they make of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel_backend.families import Transformer
from tests.errors import relative_error

RANK = 3
Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Names of linears in diffusers' class -> ``up [out, r]`` and ``down [r, in]``."""

DIFFUSERS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "diffusers": lambda n: (f"transformer.{n}.lora_B.weight", f"transformer.{n}.lora_A.weight"),
    "bare": lambda n: (f"{n}.lora_up.weight", f"{n}.lora_down.weight"),
    "peft": lambda n: (f"base_model.model.{n}.lora_B.weight", f"base_model.model.{n}.lora_A.weight"),
    "adapter's name": lambda n: (f"{n}.lora_B.default.weight", f"{n}.lora_A.default.weight"),
    "no weight": lambda n: (f"{n}.lora_B", f"{n}.lora_A"),
    "processor": lambda n: (f"{n}_lora.up.weight", f"{n}_lora.down.weight"),
    "old": lambda n: (f"{n}.lora.up.weight", f"{n}.lora.down.weight"),
    "older": lambda n: (f"{n}.lora_linear_layer.up.weight", f"{n}.lora_linear_layer.down.weight"),
    "lycoris": lambda n: (f"lycoris_{plain(n)}.lora_up.weight", f"lycoris_{plain(n)}.lora_down.weight"),
    "onetrainer": lambda n: tuple(f"lora_transformer_{plain(n)}.lora_{side}.weight" for side in ("up", "down")),
    "mixed": lambda n: (f"diffusion_model.{n}.lora_B.weight", f"diffusion_model.{n}.lora_A.weight"),
}  # fmt: skip
"""Spellings of diffusers' names."""
COMFYUI: dict[str, Callable[[str], tuple[str, ...]]] = {
    "comfyui": lambda n: (f"diffusion_model.{n}.lora_B.weight", f"diffusion_model.{n}.lora_A.weight"),
    "kohya": lambda n: (f"lora_unet_{plain(n)}.lora_up.weight", f"lora_unet_{plain(n)}.lora_down.weight"),
}
"""Spellings of the single file's names, which has queries, keys and values in one."""
STYLES = (*DIFFUSERS, *COMFYUI)


def distance(weight: Tensor, wanted: Tensor) -> float:
    """Relative, or 0 for what is the same; many biases are zero."""
    return 0.0 if torch.equal(weight, wanted) else relative_error(weight, wanted)


def plain(name: str) -> str:
    return name.replace(".", "_")


def factors_of(model: nn.Module, kind: Transformer, seed: int = 0) -> Factors:
    """For each linear of a model; those that are one weight in the single file have one ``down``."""
    found = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            (key, *_), *_ = kind.file_rows(f"{name}.weight")
            rows, columns = linear.weight.shape
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            shared = torch.Generator().manual_seed(seed + sum(map(ord, key)))
            up = torch.randn(rows, RANK, generator=generator)
            found[name] = up, torch.randn(RANK, columns, generator=shared) * 0.2 / columns**0.5
    return found


def write_lora(path: Path, style: str, kind: Transformer, factors: Factors, alpha: float | None = None) -> Path:
    """Write a file in one of `STYLES`."""
    tensors: dict[str, Tensor] = {}

    def add(names: tuple[str, ...], up: Tensor, down: Tensor) -> None:
        tensors.update(zip(names, (up.contiguous(), down), strict=True))
        if alpha is not None:
            base = names[0].replace("_lora.up", "").rpartition(".lora")[0] or names[0].partition("_lora.up")[0]
            tensors[f"{base}.alpha"] = torch.tensor(float(alpha))

    if style in DIFFUSERS:
        for name, (up, down) in factors.items():
            add(DIFFUSERS[style](name), up, down)
    else:
        rows: dict[str, dict[int, Tensor]] = {}
        downs = {}
        for name, (up, down) in factors.items():
            parts = kind.file_rows(f"{name}.weight")
            for (key, part, _), piece in zip(parts, up.chunk(len(parts)), strict=True):
                rows.setdefault(key, {})[part] = piece
                downs[key] = down
        for key, parts in rows.items():
            up = torch.cat([parts[part] for part in sorted(parts)])
            add(COMFYUI[style](key.removesuffix(".weight")), up, downs[key])
    save_file(tensors, path)
    return path


def added(state: Mapping[str, Tensor], *loras: tuple[Factors, float]) -> dict[str, Tensor]:
    """Weights with LoRAs in them, by their names in diffusers' class."""
    out = dict(state)
    for factors, strength in loras:
        for name, (up, down) in factors.items():
            weight = out[f"{name}.weight"]
            out[f"{name}.weight"] = (weight.float() + strength * (up @ down)).to(weight.dtype)
    return out
