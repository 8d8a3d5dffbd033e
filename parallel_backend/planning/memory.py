"""How much memory a layout needs on each rank: weights counted exactly on the meta device, activations estimated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from ..config import ParallelismConfig
from ..families import Family, Model, TextEncoder
from ..loading.targets import LINEARS
from ..mesh import Axis
from ..parallel.tensor import apply_tensor_parallel

GIB = 2**30
RUNTIME_BYTES = 3 * GIB // 2
"""Set aside on each GPU for the CUDA context, NCCL's buffers, libraries' workspaces and the allocator's gaps."""

_DEGREES = "111 112 114 118 121 141 181 211 411 811 412 214 142 124 222"  # of ulysses, ring and tp
LAYOUTS = tuple(
    ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)
    for ulysses, ring, tp in (map(int, degrees) for degrees in _DEGREES.split())
)
"""The layouts that people compare: one GPU, and every common one of 2, 4 and 8."""

_VAE_DTYPE_BYTES = 4  # the workers keep the VAE in fp32


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
    """Bytes that rank 0, the fullest one, needs on its GPU for one picture or video (`ReferenceModel.sample`)."""

    weights: WeightBytes
    activations: int
    runtime: int = RUNTIME_BYTES
    others: int = 0
    """Weights of the transformers that take turns with the one that is counted (`ReferenceModel.transformers`)."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights.total + self.others + self.activations + self.runtime


@dataclass(frozen=True)
class LayoutFit:
    """What a layout needs of each GPU to run a family's reference model, in GiB, and whether it fits.

    Rank 0, which alone has the VAE, is the one that is looked at.

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
) -> WeightBytes:
    """Count the weights of rank 0, by sharding the real models on the meta device as the workers do.

    What the family does not bring counts nothing. The VAE is that of its class's defaults. A vision tower is not
    counted: it is loaded when a prompt has images.

    Args:
        family: which model.
        transformer_config: the transformer's configuration; what it leaves out has diffusers' defaults.
        text_config: the text encoder's configuration, as its ``config.json`` has it.
        layout: degrees; the transformer is sharded over tp, the text encoder over all ranks.
        dtype_bytes: bytes of one weight of the transformer and the text encoder; the VAE is held in fp32.

    Raises:
        ValueError: the model cannot be split so.
    """
    family.transformer.check_layout(_full_config(family, _key(transformer_config)), layout)
    return WeightBytes(
        transformer=transformer_bytes(family, transformer_config, layout, dtype_bytes),
        text_encoder=_text_counts(family, text_config, layout)[0] * dtype_bytes,
        vae=0 if family.vae is None else _numel(_default_vae(family)) * _VAE_DTYPE_BYTES,
    )


def transformer_bytes(
    family: Family, config: Mapping[str, Any], layout: ParallelismConfig, dtype_bytes: int = 2
) -> int:
    """Bytes of the transformer's weights that a rank holds; arguments as of `weight_bytes`."""
    return _transformer_counts(family, _key(config), layout.tp_size)[0] * dtype_bytes


def transformer_activation_bytes(
    family: Family, config: Mapping[str, Any], layout: ParallelismConfig, tokens: int, dtype_bytes: int = 2
) -> int:
    """Estimate the peak of one transformer forward on a rank, beside its weights. An estimate, not a count.

    What is kept of conditionings from step to step counts with it.

    The family says how many features of a token are held at the peak. Ring adds accumulators in fp32, which
    `RUNTIME_BYTES` covers.

    Args:
        family: which model.
        config: the transformer's configuration, with every value.
        layout: degrees.
        tokens: image and text tokens of the full sequence, times the batch.
        dtype_bytes: bytes of one activation.
    """
    kind = family.transformer
    held = -(-tokens // layout.cp_size) * kind.activation_width(config, layout.tp_size) * dtype_bytes
    return held + kind.kept_bytes(config, layout.tp_size, dtype_bytes)


def vae_activation_bytes(family: Family, config: Mapping[str, Any], pixels: int, ranks: int = 1) -> int:
    """Estimate the peak of decoding an image of ``pixels`` in fp32 on rank 0, with ``ranks`` in all.

    The family says how many features of a pixel there are, and whether ranks share them.
    """
    kind = family.needs_vae()
    return -(-kind.width(config) * pixels * _VAE_DTYPE_BYTES // (ranks if kind.over_ranks else 1))


def reference_memory(family: Family, layout: ParallelismConfig, fp8: bool = False) -> MemoryEstimate:
    """What a family's reference model needs on rank 0 for its sample (`ReferenceModel.sample`).

    Args:
        family: whose.
        layout: degrees.
        fp8: as its ``fp8_files`` rather than in bfloat16.

    Raises:
        ValueError: the model cannot be split so.
    """
    config, reference = reference_config(family), family.reference_model
    weights = weight_bytes(family, reference.transformer_config, reference.text_config, layout)
    if fp8:
        weights = _as_fp8_files(family, weights, layout)
    others = (reference.transformers - 1) * weights.transformer
    return MemoryEstimate(weights, step_activation_bytes(family, config, layout), others=others)


def _as_fp8_files(family: Family, bf16: WeightBytes, layout: ParallelismConfig) -> WeightBytes:
    """Weights of the reference model where the blocks' linears are in 8 bits, but for what the file's size tells.

    Which of them a "mixed" file keeps in bfloat16 is its own matter: on a rank they are split as the others are.
    """
    reference = family.reference_model
    config = _key(reference.transformer_config)
    whole = _transformer_counts(family, config, 1)[0] * 2 - _transformer_counts(family, config, 1)[1]
    kept = max(0, reference.fp8_bytes - whole)
    return WeightBytes(
        bf16.transformer - _transformer_counts(family, config, layout.tp_size)[1] + kept // layout.tp_size,
        bf16.text_encoder - _text_counts(family, reference.text_config, layout)[1],
        bf16.vae,
    )


def step_activation_bytes(family: Family, config: Mapping[str, Any], layout: ParallelismConfig) -> int:
    """Estimate the peak beside the weights on rank 0 for the family's sample: of a step, or of its decoding.

    They take turns, so the larger counts. The VAE is that of its class's defaults, the prompt is as long as that of the
    family's reference model; ``config`` is the transformer's, with every value.
    """
    reference, decoding = family.reference_model, 0
    if family.vae is not None:
        # A clip is decoded a latent frame at a time.
        frames = 1 if reference.frames == 1 else max(1, family.vae.latent_shape({}).frames)
        pixels = reference.width * reference.height * frames
        decoding = vae_activation_bytes(family, dict(_default_vae(family).config), pixels, layout.world_size)
    return max(_step_bytes(family, config, layout), decoding)


def reference_step_bytes(family: Family, layout: ParallelismConfig) -> int:
    """Estimate the peak beside the weights in a step of a family's reference model, for its sample."""
    return _step_bytes(family, reference_config(family), layout)


def _step_bytes(family: Family, config: Mapping[str, Any], layout: ParallelismConfig) -> int:
    model = family.reference_model
    tokens = family.transformer.latent_tokens(config, model.width, model.height, model.frames) + model.text_tokens
    return transformer_activation_bytes(family, config, layout, tokens)


def layout_fits(
    family: Family, layouts: Iterable[ParallelismConfig], gpus: Sequence[tuple[int, int]]
) -> list[LayoutFit]:
    """What each layout needs for a family's reference model.

    Layouts that the model cannot be split by are left out, and where there are GPUs, those with more ranks than GPUs.

    Args:
        family: whose reference model.
        layouts: which to look at.
        gpus: total and free bytes of each GPU, in rank order; empty where there are none.
    """
    rows = []
    for layout in layouts:
        used = gpus[: layout.world_size]
        if (gpus and len(used) < layout.world_size) or not can_split(family, layout):
            continue
        need = reference_memory(family, layout)
        fits = "no" if used else ""
        if used and all(need.total <= total for total, _ in used):
            fits = "yes" if all(need.total <= free for _, free in used) else "busy"
        weights = need.weights
        transformers = weights.transformer + need.others
        parts = (transformers, weights.text_encoder, weights.vae, need.activations, need.runtime, need.total)
        dit, text, vae, activations, runtime, total = (round(size / GIB, 3) for size in parts)
        row = LayoutFit(layout.name, layout.world_size, dit, text, vae, activations, runtime, total, fits)
        rows.append(row)
    return rows


def what_fits(family: Family, memory: int, ranks: int) -> str:
    """A remedy: the layouts that fit GPUs of ``memory`` bytes, on as many ranks as asked for or else on the fewest."""
    fitting = [row for row in layout_fits(family, LAYOUTS, []) if row.total * GIB <= memory]
    if not fitting:
        return f"use GPUs with more memory: no layout of up to 8 of these holds {family.reference_model.name}"
    fewest = min(row.ranks for row in fitting)
    chosen = [row for row in fitting if row.ranks == ranks] or [row for row in fitting if row.ranks == fewest]
    return f"{' or '.join(row.name for row in chosen)}, on {chosen[0].ranks} of these GPUs, would fit"


def can_split(family: Family, layout: ParallelismConfig) -> bool:
    """Whether the transformer of a family's reference model can be split by a layout."""
    try:
        family.transformer.check_layout(reference_config(family), layout)
    except ValueError:
        return False
    return True


def reference_config(family: Family) -> Mapping[str, Any]:
    """The transformer's configuration of a family's reference model, with every value."""
    return _full_config(family, _key(family.reference_model.transformer_config))


def _key(config: Mapping[str, Any]) -> str:
    """A configuration as something that can be a key of a cache."""
    return json.dumps(dict(config), sort_keys=True, default=list)


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@lru_cache(maxsize=64)
def _full_config(family: Family, config: str) -> dict[str, Any]:
    full = dict(family.transformer.build(json.loads(config)).config)
    return {name: value for name, value in full.items() if not name.startswith("_")}


@lru_cache(maxsize=64)
def _transformer_counts(family: Family, config: str, degree: int) -> tuple[int, int]:
    """Parameters of a rank, and how many of them are weights of its blocks' linears."""
    model = family.transformer.build(json.loads(config))
    apply_tensor_parallel(model, family.transformer.plan(dict(model.config)), Axis(None, degree, 0))
    stacks = [getattr(model, stack.attribute) for stack in family.transformer.block_stacks]
    return _numel(model), sum(map(_linears, stacks))


def _text_counts(family: Family, config: Mapping[str, Any], layout: ParallelismConfig) -> tuple[int, int]:
    """The same of the text model, whose linears are all in its layers; nothing where the family has none."""
    if family.text_encoder is None:
        return 0, 0
    return _sharded_text_counts(
        family.text_encoder, _key(config), family.text_encoder.degree(config, layout.world_size)
    )


@lru_cache(maxsize=64)
def _sharded_text_counts(kind: TextEncoder, config: str, degree: int) -> tuple[int, int]:
    from ..parallelize import shard_text_model  # with the compiler, which takes a second to import

    values = json.loads(config)
    model = kind.build(values)
    shard_text_model(model, kind, values, Axis(None, degree, 0))
    return _numel(model), _linears(model)


def _linears(model: nn.Module) -> int:
    modules = (module for module in model.modules() if isinstance(module, LINEARS))
    return sum(module.weight.numel() for module in modules)  # type: ignore[union-attr, operator]


@lru_cache(maxsize=8)
def _default_vae(family: Family) -> Model:
    """The VAE with the defaults of its diffusers class, on the meta device."""
    return family.needs_vae().build({})
