"""Transformers and text encoders of a shape with random weights, and inputs for them: the same on every layout."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AS_IT_IS, ParallelismConfig, Speed
from ..families import Conditioning, Family, Model, family_of_transformer
from ..mesh import ParallelMesh
from ..parallel.products import stored_tensors
from ..parallel.tensor import ParamShard
from ..parallelize import parallelize_transformer, shard_text_model, text_axes
from .quantized import quantize
from .shapes import Shape


def transformer_config(shape: Shape, blocks: int | None = None) -> tuple[Family, dict[str, Any]]:
    """The family of a shape, and its transformer's configuration, with ``blocks`` of each kind if that is given."""
    family = family_of_transformer(shape.transformer)
    config = dict(family.reference_model.transformer_config) | dict(shape.config)
    return family, config | (dict.fromkeys(shape.depths, blocks) if blocks else {})


def build_transformer(
    shape: Shape,
    layout: ParallelismConfig,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    blocks: int | None = None,
    speed: Speed = AS_IT_IS,
    weights: str = "",
) -> Model:
    """This rank's part of a shape's transformer, with random weights (quantized, if that is named) on its device."""
    family, config = transformer_config(shape, blocks)
    model = family.transformer.build(config)
    table = parallelize_transformer(model, family.transformer, layout, mesh, speed)
    fill(model, torch.device(mesh.device_type), dtype, table)
    if weights:
        quantize(model, weights, table, dtype)
    return model


def build_text_model(
    shape: Shape, mesh: ParallelMesh, dtype: torch.dtype, weights: str = ""
) -> tuple[Model, Family, Mapping[str, Any]] | None:
    """This rank's part of a shape's text encoder, its family and its configuration; None where there is none.

    Its weights are quantized, if that is named; its products are not, as in ComfyUI.
    """
    if shape.text_config is None:
        return None
    family = family_of_transformer(shape.transformer)
    config = shape.text_config or family.reference_model.text_config
    kind = family.needs_text_encoder()
    model = kind.build(config)
    table = shard_text_model(model, kind, config, text_axes(kind, config, mesh)[0])
    fill(model, torch.device(mesh.device_type), dtype, table)
    if weights:
        quantize(model, weights, table, dtype, units=False)
    return model, family, config


@torch.no_grad()
def fill(
    model: nn.Module, device: torch.device, dtype: torch.dtype, table: Mapping[str, ParamShard] | None = None
) -> None:
    """Give each parameter random values on a device.

    A parameter's values depend on its name alone, so that the shards of all ranks are those of one model. Matrices keep
    the variance of what they multiply; vectors are 1 (weights) or 0 (biases).

    Args:
        model: its parameters may be on the meta device, or DTensors, whose local parts are then filled.
        device, dtype: of the weights.
        table: the slices that this rank holds of what is sharded.
    """
    generator = torch.Generator(device)
    for name, parameter in list(model.named_parameters()):
        shard = (table or {}).get(name)
        local = local_part(parameter)
        size = list(local.shape)
        if shard is not None:
            size[shard.dim] = shard.size
        values = torch.empty(size, dtype=dtype, device=device)
        if len(size) == 1:
            values.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            generator.manual_seed(zlib.crc32(name.encode()))
            values.normal_(std=values[0].numel() ** -0.5, generator=generator)
        values = values if shard is None else shard.take(values)
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            values = values.clone(memory_format=torch.contiguous_format)  # not a view that keeps the full tensor
            setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
        else:
            local.copy_(values)
    model.to(device)  # buffers


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter that may be a DTensor."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this rank holds."""
    return sum(local_part(tensor).nbytes for tensor in stored_tensors(model))


def make_inputs(
    shape: Shape, width: int, height: int, text: int, device: str, dtype: torch.dtype, frames: int = 1
) -> tuple[Tensor, dict[str, Any]]:
    """A latent, and the transformer's arguments for it with a context of ``text`` tokens: the same on every rank."""
    family, config = transformer_config(shape)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    kind = family.transformer
    x = random(*kind.latent_shape(config, width, height, frames))
    tensors = {name: random(*size) for name, size in kind.example_tensors(config, x.shape).items()}
    if "guidance" in tensors:
        tensors["guidance"] = torch.full((1,), 4.0, device=device)
    timestep = torch.full((1,), 0.5 * kind.timestep_scale, device=device)
    return x, kind.inputs(x, timestep, Conditioning(random(1, text, shape.features), tensors=tensors))
