"""What is supported, family by family: read off the families, never written down a second time."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import ParallelismConfig
from ..families import FAMILIES, Family
from ..loading.quantized import FP8_LAYOUTS
from ..loading.safetensors_reader import DTYPES, FP8_DTYPES, WEIGHT_DTYPES
from ..mesh import Axis
from ..parallel.formats import FORMATS
from ..parallel.tensor import Shard
from .memory import GIB, can_split, reference_config, reference_memory

RANKS = 8
"""Degrees are looked at up to so many ranks, the GPUs of one machine."""
DEGREES = (1, 2, 4, 8)
"""For which weights are counted."""


@dataclass(frozen=True)
class FamilySupport:
    """What is supported of one family. All that is counted is that of its reference model.

    Args:
        name: short name, as ``doctor --model`` takes it.
        title: the name people know.
        ranks: degrees were looked at up to so many.
        models: that the family covers.
        transformer_alone: of these, those whose text encoder is another, and stays ComfyUI's own.
        reference: name of the model that is counted.
        pipelines: diffusers pipeline classes.
        transformer, text_encoder, vae: classes of diffusers and transformers; empty for what stays ComfyUI's.
        heads: attention heads of the transformer.
        ulysses: degrees of Ulysses that fit, up to ``ranks``; so does any product of Ulysses and TP that is among them.
        tp: degrees of tensor parallelism that fit, up to ``ranks``.
        ring: degrees of Ring that fit, up to ``ranks``.
        text_ranks: over how many of ``ranks`` ranks a copy of the text encoder is sharded; 0 if there is none.
        copies: of the transformer under TP over the largest degree, and of the text encoder over ``text_ranks``: module
            names, with ``*`` for numbers -> on how many ranks each weight is, where that is more than one.
        blocks: lists of blocks that the block cache goes over, and how long they are.
        vision_tower: whether the text encoder looks at images (whole, on rank 0).
        reference_methods: how reference images can be told apart from the picture; empty if there can be none.
        text_file: what the text encoder's single file is called.
        vae_on_all: whether all ranks hold the VAE, and share each picture.
        vae_file: names of the VAE's single files.
        transformer_gib: TP degree -> GiB of weights a rank in bf16.
        text_encoder_gib: ranks of the layout -> the same of the text encoder.
    """

    name: str
    title: str
    ranks: int
    models: tuple[str, ...]
    transformer_alone: tuple[str, ...]
    reference: str
    pipelines: tuple[str, ...]
    transformer: str
    text_encoder: str
    vae: str
    heads: int
    ulysses: tuple[int, ...]
    tp: tuple[int, ...]
    ring: tuple[int, ...]
    text_ranks: int
    copies: dict[str, dict[str, int]]
    blocks: dict[str, int]
    vision_tower: bool
    reference_methods: tuple[str, ...]
    text_file: str
    vae_on_all: bool
    vae_file: str
    transformer_gib: dict[int, float]
    text_encoder_gib: dict[int, float]


def family_support(family: Family) -> FamilySupport:
    """What is supported of a family; its models are built on the meta device, which takes a few seconds."""
    config, text_config = reference_config(family), family.reference_model.text_config
    kind, encoder = family.transformer, family.text_encoder
    transformer = kind.build(config)
    degrees = range(1, RANKS + 1)
    ulysses = tuple(n for n in degrees if can_split(family, ParallelismConfig(ulysses_size=n)))
    ring = tuple(n for n in degrees if can_split(family, ParallelismConfig(ring_size=n)))
    tp = tuple(n for n in degrees if can_split(family, ParallelismConfig(tp_size=n)))
    weights = {n: reference_memory(family, ParallelismConfig(tp_size=n)).weights for n in DEGREES if n in tp}
    on_ranks = {"transformer": copies(transformer, kind.plan(config), tp[-1])}
    text_ranks, text_weights = 0, {}
    if encoder is not None:
        text_ranks = encoder.degree(text_config, RANKS)
        text_weights = {n: reference_memory(family, ParallelismConfig(ring_size=n)).weights for n in DEGREES}
        on_ranks["text_encoder"] = copies(encoder.build(text_config), encoder.plan(text_config), text_ranks)
    return FamilySupport(
        name=family.name,
        title=family.title,
        ranks=RANKS,
        models=family.models,
        transformer_alone=family.transformer_alone,
        reference=family.reference_model.name,
        pipelines=family.pipeline_classes,
        transformer=kind.class_name,
        text_encoder="" if encoder is None else encoder.class_name,
        vae="" if family.vae is None else family.vae.class_name,
        heads=kind.heads(config),
        ulysses=ulysses,
        tp=tp,
        ring=ring,
        text_ranks=text_ranks,
        copies=on_ranks,
        blocks={stack.attribute: len(getattr(transformer, stack.attribute)) for stack in kind.block_stacks},
        vision_tower=encoder is not None and encoder.has_vision_tower,
        reference_methods=tuple(kind.conditioning_options.get("reference_method", ())),
        text_file="" if encoder is None else encoder.file_title,
        vae_on_all=family.vae is not None and family.vae.over_ranks,
        vae_file="" if family.vae is None else family.vae.file_title,
        transformer_gib={n: round(found.transformer / GIB, 1) for n, found in weights.items()},
        text_encoder_gib={n: round(found.text_encoder / GIB, 1) for n, found in text_weights.items()},
    )


def file_formats() -> dict[str, tuple[str, ...]]:
    """What weights in single files may be stored as: torch's dtypes, where fp8 files keep scales, and formats."""
    names = {dtype: str(DTYPES[dtype]).removeprefix("torch.") for dtype in WEIGHT_DTYPES}
    return {
        "dtypes": tuple(name for dtype, name in names.items() if dtype not in FP8_DTYPES),
        "fp8_dtypes": tuple(name for dtype, name in names.items() if dtype in FP8_DTYPES),
        "fp8_scales": FP8_LAYOUTS,
        "quantized": tuple(FORMATS),
    }


def support() -> dict[str, Any]:
    """All families and file formats, as `FamilySupport` by the families' names and as `file_formats`."""
    return {"families": {family.name: family_support(family) for family in FAMILIES}, "files": file_formats()}


def copies(model: nn.Module, plan: Mapping[str, Shard], degree: int) -> dict[str, int]:
    """Which modules' weights are on more than one of ``degree`` ranks.

    Args:
        model: in full; weights may be on the meta device.
        plan: how its weights are sharded.
        degree: over how many ranks.

    Returns:
        Names of modules, with ``*`` for numbers -> on how many ranks each of its weights is.
    """
    modules = dict(model.named_modules())
    found = {}
    sharded: set[str] = set()
    for pattern, shard in plan.items():
        names = fnmatch.filter(modules, pattern)
        sharded.update(names)
        size = modules[names[0]].weight.shape[shard.dim]  # type: ignore[union-attr, index]
        axes = [Axis(None, degree, rank) for rank in range(degree)]
        held = sum(end - start for axis in axes for start, end in shard.ranges(size, axis))
        found[pattern] = held // size  # type: ignore[operator]
    for name, module in modules.items():
        if name not in sharded and any(True for _ in module.parameters(recurse=False)):
            found[re.sub(r"\.\d+(?=\.|$)", ".*", name)] = degree
    return {name: number for name, number in found.items() if number > 1}
