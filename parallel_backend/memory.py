"""How much memory a layout needs on each rank: weights counted exactly on the meta device, activations estimated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import nn

from .config import ParallelismConfig
from .families import Family, family_of_transformer
from .mesh import Axis
from .parallel.tensor import apply_tensor_parallel
from .parallelize import shard_text_model

GIB = 2**30
RUNTIME_BYTES = 3 * GIB // 2
"""Set aside on each GPU for the CUDA context, NCCL's buffers, libraries' workspaces and the allocator's gaps."""

_DEGREES = "111 112 114 118 121 141 181 211 411 811 412 214 142 124 222"  # of ulysses, ring and tp
LAYOUTS = tuple(
    ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)
    for ulysses, ring, tp in (map(int, degrees) for degrees in _DEGREES.split())
)
"""The layouts that people compare: one GPU, and every common one of 2, 4 and 8."""

IMAGE_PIXELS = 1024 * 1024
TEXT_TOKENS = 512
_VAE_DTYPE_BYTES = 4  # the workers keep the VAE in fp32

# Mistral-Small-3.2-24B, as FLUX.2-dev's text_encoder/config.json has it. The vision tower and the last ten layers play
# no part: the workers do not hold them.
FLUX2_DEV_TEXT_CONFIG: dict[str, Any] = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights that a rank holds; the VAE is on rank 0 only."""

    transformer: int
    text_encoder: int
    vae: int

    @property
    def total(self) -> int:
        """Bytes of weights on rank 0."""
        return self.transformer + self.text_encoder + self.vae


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that rank 0, the fullest one, needs on its GPU for one 1024 x 1024 image."""

    weights: WeightBytes
    activations: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights.total + self.activations + self.runtime


@dataclass(frozen=True)
class LayoutFit:
    """What a layout needs of each GPU to run FLUX.2-dev, in GiB (rank 0, which alone has the VAE), and whether it fits.

    ``fits`` is ``"yes"``, ``"busy"`` (once other programs free memory), ``"no"``, or ``""`` where there are no GPUs.
    """

    name: str
    ranks: int
    transformer: float
    text_encoder: float
    vae: float
    activations: float
    runtime: float
    total: float
    fits: str


def weight_bytes(
    family: Family,
    transformer_config: Mapping[str, Any],
    text_config: Mapping[str, Any],
    layout: ParallelismConfig,
    dtype_bytes: int = 2,
    vae_class: str = "AutoencoderKLFlux2",
) -> WeightBytes:
    """Count the weights of rank 0, by sharding the real models on the meta device as the workers do.

    Args:
        family: which model.
        transformer_config: the transformer's configuration; what it leaves out has diffusers' defaults.
        text_config: the text encoder's configuration, as its ``config.json`` has it.
        layout: degrees; the transformer is sharded over tp, the text encoder over all ranks.
        dtype_bytes: bytes of one weight of the transformer and the text encoder; the VAE is held in fp32.
        vae_class: diffusers class of the VAE, counted with its default configuration.

    Raises:
        ValueError: the model cannot be split so.
    """
    text_degree = family.text_degree(text_config, layout.world_size)
    family.check_layout(_full_config(family, _key(transformer_config)), layout)
    return WeightBytes(
        transformer=_transformer_numel(family, _key(transformer_config), layout.tp_size) * dtype_bytes,
        text_encoder=_text_numel(family, _key(text_config), text_degree) * dtype_bytes,
        vae=_numel(_build_vae(vae_class)) * _VAE_DTYPE_BYTES,
    )


def transformer_activation_bytes(
    family: Family, config: Mapping[str, Any], layout: ParallelismConfig, tokens: int, dtype_bytes: int = 2
) -> int:
    """Estimate the peak of one transformer forward on a rank, beside its weights. An estimate, not a count.

    The family says how many features of a token are held at the peak. Ring adds accumulators in fp32, which
    `RUNTIME_BYTES` covers.

    Args:
        family: which model.
        config: the transformer's configuration, with every value.
        layout: degrees.
        tokens: image and text tokens of the full sequence, times the batch.
        dtype_bytes: bytes of one activation.
    """
    return -(-tokens // layout.cp_size) * family.activation_width(config, layout.tp_size) * dtype_bytes


def vae_activation_bytes(family: Family, config: Mapping[str, Any], pixels: int) -> int:
    """Estimate the peak of decoding an image of ``pixels`` in fp32: five tensors of the widest full-size layer.

    They are a residual block's input, its norm, the activation of that and what cuDNN's convolutions need beside them;
    on an H200, FLUX.2's VAE took 4.4 to 4.9 GiB for 1024 x 1024.
    """
    return 5 * family.vae_width(config) * pixels * _VAE_DTYPE_BYTES


def flux2_dev_memory(layout: ParallelismConfig) -> MemoryEstimate:
    """What FLUX.2-dev needs on rank 0 in bfloat16 for one 1024 x 1024 image and 512 text tokens.

    Raises:
        ValueError: FLUX.2-dev cannot be split so.
    """
    family, config = flux2_dev()
    tokens = IMAGE_PIXELS // family.latent_downscale**2 + TEXT_TOKENS
    # Transformer and VAE take turns, so the larger of the two counts.
    activations = max(
        transformer_activation_bytes(family, config, layout, tokens),
        vae_activation_bytes(family, dict(_build_vae(family.vae_class).config), IMAGE_PIXELS),
    )
    return MemoryEstimate(weight_bytes(family, config, FLUX2_DEV_TEXT_CONFIG, layout), activations)


def layout_fits(layouts: Iterable[ParallelismConfig], gpus: Sequence[tuple[int, int]]) -> list[LayoutFit]:
    """What each layout needs for FLUX.2-dev; where there are GPUs, without the layouts that have more ranks than those.

    Args:
        layouts: which to look at.
        gpus: total and free bytes of each GPU, in rank order; empty where there are none.

    Raises:
        ValueError: FLUX.2-dev cannot be split so.
    """
    rows = []
    for layout in layouts:
        used = gpus[: layout.world_size]
        if gpus and len(used) < layout.world_size:
            continue
        need = flux2_dev_memory(layout)
        fits = "no" if used else ""
        if used and all(need.total <= total for total, _ in used):
            fits = "yes" if all(need.total <= free for _, free in used) else "busy"
        weights = need.weights
        parts = (weights.transformer, weights.text_encoder, weights.vae, need.activations, need.runtime, need.total)
        dit, text, vae, activations, runtime, total = (round(size / GIB, 2) for size in parts)
        row = LayoutFit(layout.name, layout.world_size, dit, text, vae, activations, runtime, total, fits)
        rows.append(row)
    return rows


def what_fits(memory: int, ranks: int) -> str:
    """A remedy: the layouts that fit GPUs of ``memory`` bytes, on as many ranks as asked for or else on the fewest."""
    fitting = [row for row in layout_fits(LAYOUTS, []) if row.total * GIB <= memory]
    if not fitting:
        return "use GPUs with more memory: no layout of up to 8 of these holds FLUX.2-dev"
    fewest = min(row.ranks for row in fitting)
    chosen = [row for row in fitting if row.ranks == ranks] or [row for row in fitting if row.ranks == fewest]
    return f"{' or '.join(row.name for row in chosen)}, on {chosen[0].ranks} of these GPUs, would fit"


def flux2_dev() -> tuple[Family, Mapping[str, Any]]:
    """FLUX.2-dev's family and its transformer's configuration, which are the defaults of diffusers' class."""
    family = family_of_transformer("Flux2Transformer2DModel")
    return family, _full_config(family, "{}")


def _key(config: Mapping[str, Any]) -> str:
    """A configuration as something that can be a key of a cache."""
    return json.dumps(dict(config), sort_keys=True, default=list)


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=64)
def _full_config(family: Family, config: str) -> dict[str, Any]:
    full = dict(family.build_transformer(json.loads(config)).config)
    return {name: value for name, value in full.items() if not name.startswith("_")}


@lru_cache(maxsize=64)
def _transformer_numel(family: Family, config: str, degree: int) -> int:
    model = family.build_transformer(json.loads(config))
    apply_tensor_parallel(model, family.transformer_plan(dict(model.config)), Axis(None, degree, 0))
    return _numel(model)


@lru_cache(maxsize=64)
def _text_numel(family: Family, config: str, degree: int) -> int:
    values = json.loads(config)
    model = family.build_text_model(values)
    shard_text_model(model, family, values, Axis(None, degree, 0))
    return _numel(model)


@lru_cache(maxsize=8)
def _build_vae(class_name: str) -> Any:
    with torch.device("meta"):
        return getattr(diffusers, class_name)()
