"""Tensor parallelism with plain modules: which slice of a weight a tp rank holds, and the linears that use it.

The scheme is Megatron-LM's (arXiv:1909.08053): a column-parallel linear makes rank-local features without talking, the
row-parallel linear after it sums the ranks' partial results with one all-reduce. Fused projections are sharded block by
block, so that every rank holds its own slice of each of q, k, v, gate and up.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..mesh import Axis, all_gather
from .products import Multiplier, Product, product_of
from .sequence import split_sizes

Model = Any
"""A module of diffusers or transformers: an `nn.Module` whose attributes type checkers cannot know."""


class _Together(Protocol):
    """Linears whose outputs travel together (`modulation`)."""

    def output(self, linear: ColumnParallelLinear, x: Tensor) -> Tensor:
        """All features of one of them."""


@dataclass(frozen=True)
class Shard:
    """How the weight ``[out, in]`` of a linear (or ``[vocab, hidden]`` of an embedding) is spread over an axis.

    Args:
        style: ``"column"`` (output features are split), ``"row"`` (input features are split, outputs are summed),
            ``"embedding"`` (hidden features are split and gathered), ``"local_embedding"`` (they stay split), or
            ``"vector"`` (the weight ``[features]`` of a norm, whose features are those of a column-parallel linear).
        blocks: sizes of the blocks that are fused in the split dim, each split by itself; empty for one block.
        units: number of indivisible units (such as kv heads) in a block; 0 if any equal split will do. Where there are
            more ranks than units, neighbouring ranks hold the same unit.
        groups: number of equal groups of units that a rank never has parts of two of, unless it has them whole (such as
            the query heads of a kv head); 0 if there are none. Where there are more ranks than groups, the ranks of a
            group split its units, unevenly if need be.
        gather_output: gather the column-parallel output, so that every rank has all features. All such linears of a
            model must run on the same vectors in each forward: their outputs travel together (`modulation`).
    """

    style: str
    blocks: tuple[int, ...] = ()
    units: int = 0
    groups: int = 0
    gather_output: bool = False

    @property
    def dim(self) -> int:
        """The weight's dim that is split."""
        return 0 if self.style in ("column", "vector") else 1

    def ranges(self, size: int, axis: Axis, name: str = "weight") -> list[tuple[int, int]]:
        """Half-open ranges of the split dim that this rank holds, one a block.

        Args:
            size: full size of the split dim.
            axis: the axis to split over.
            name: what to call the weight in an error.

        Raises:
            ValueError: a block that does not divide over the axis.
        """
        blocks = self.blocks or (size,)
        assert sum(blocks) == size, f"{name}: blocks {blocks} do not add up to {size}"
        if self.groups and axis.degree > self.groups:
            return [self._part_of_group(size, axis, name)]
        parts = min(axis.degree, self.units) if self.units else axis.degree
        if axis.degree % parts or self.units % parts:
            raise ValueError(f"{name}: {self.units} heads and {axis.degree} ranks do not divide each other")
        index = axis.rank * parts // axis.degree
        ranges, start = [], 0
        for block in blocks:
            if block % parts:
                raise ValueError(f"{name}: {block} features do not divide over {parts} tensor-parallel ranks")
            step = block // parts
            ranges.append((start + index * step, start + (index + 1) * step))
            start += block
        return ranges

    def _part_of_group(self, size: int, axis: Axis, name: str) -> tuple[int, int]:
        """The range of a rank that shares a group's units with others."""
        if axis.degree % self.groups:
            raise ValueError(f"{name}: {self.groups} groups of heads and {axis.degree} ranks do not divide each other")
        sharing, width, per_group = axis.degree // self.groups, size // self.units, self.units // self.groups
        group, member = divmod(axis.rank, sharing)
        sizes = split_sizes(per_group, sharing)
        if 0 in sizes:
            raise ValueError(f"{name}: {self.units} heads do not suffice for {axis.degree} ranks")
        first = group * per_group + sum(sizes[:member])
        return first * width, (first + sizes[member]) * width


@dataclass(frozen=True)
class ParamShard:
    """The slice of one full parameter that a rank holds: ranges along ``dim``, which is ``size`` long in full."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    size: int

    def take(self, full: Tensor) -> Tensor:
        """Cut the slice out of a full tensor (or of anything that slices like one along the first two dims)."""
        parts = [full[a:b] if self.dim == 0 else full[:, a:b] for a, b in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)


class ColumnParallelLinear(Multiplier):
    """Linear whose output features are split: ``[..., in] -> [..., out_local]``, or ``[..., out]`` when gathered."""

    def __init__(self, weight: Tensor, bias: Tensor | None, axis: Axis, gather_output: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.axis = axis
        self.gather_output = gather_output
        self.together: _Together | None = None

    def local(self, x: Tensor) -> Tensor:
        """This rank's features."""
        return product_of(self).product(x, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.together is not None:
            return self.together.output(self, x)
        y = self.local(x)
        return all_gather_last_dim(y, self.axis) if self.gather_output else y


class RowParallelLinear(Multiplier):
    """Linear whose input features are split: ``[..., in_local] -> [..., out]``, summed over the axis."""

    def __init__(self, weight: Tensor, bias: Tensor | None, axis: Axis) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.axis = axis

    def partial_bias(self) -> Tensor | None:
        """The bias is whole on every rank, and part of the sum once: in the first rank's product, where it is free."""
        return self.bias if self.axis.rank == 0 else None

    def partial(self, x: Tensor) -> Tensor:
        """What this rank adds to the sum."""
        return product_of(self).product(x, self.partial_bias())

    def forward(self, x: Tensor) -> Tensor:
        y = self.partial(x)
        dist.all_reduce(y, group=self.axis.group)
        return y


class WholeLinear(Multiplier):
    """Linear on one rank with a `Product`: ``[..., in] -> [..., out]``."""

    def __init__(self, product: Product, bias: Tensor | None) -> None:
        super().__init__()
        self.product = product
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product_of(self).product(x, self.bias)


def hold(model: nn.Module, name: str, product: Product) -> None:
    """Have a model's linear multiply with a product; one of torch's gives its place to a `WholeLinear`."""
    linear = model.get_submodule(name)
    if not isinstance(linear, Multiplier):
        whole = WholeLinear(product, None)
        whole.weight, whole.bias = linear.weight, linear.bias  # type: ignore[assignment]
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole)
        linear = whole
    linear.hold(product)


class ColumnParallelEmbedding(nn.Module):
    """Embedding whose hidden features are split: ids ``[...] -> [..., hidden]``, or ``[..., hidden_local]``."""

    def __init__(self, weight: Tensor, axis: Axis, gather_output: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.axis, self.gather_output = axis, gather_output

    def forward(self, ids: Tensor) -> Tensor:
        local = F.embedding(ids, self.weight)
        return all_gather_last_dim(local, self.axis) if self.gather_output else local


def all_gather_last_dim(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate ``[..., n]`` of every rank of the axis to ``[..., n * degree]``, in rank order."""
    return all_gather(x, axis).movedim(0, -2).flatten(-2)


def apply_tensor_parallel(model: nn.Module, plan: Mapping[str, Shard], axis: Axis) -> dict[str, ParamShard]:
    """Replace the linears and embeddings that a plan names by their sharded forms, on this instance only.

    Weights that are real are cut; weights on the meta device become meta tensors of the rank-local shape, to be filled
    by a loader from the table that is returned.

    Args:
        model: the model to change in place.
        plan: glob over module names -> Shard. Every glob must match something.
        axis: the axis to shard over; nothing happens if it is not split.

    Returns:
        For each sharded parameter name the slice of the full parameter that this rank holds.

    Raises:
        ValueError: a weight that does not divide over the axis, by name.
    """
    if not axis.is_split:
        return {}
    modules = dict(model.named_modules())
    table: dict[str, ParamShard] = {}
    for pattern, shard in plan.items():
        names = fnmatch.filter(modules, pattern)
        assert names, f"the tensor-parallel plan names {pattern}, which {type(model).__name__} does not have"
        for name in names:
            parent, _, leaf = name.rpartition(".")
            replacement = _shard_module(modules[name], shard, axis, name, table)
            setattr(modules[parent], leaf, replacement)
    return table


def coarser(model: nn.Module, plan: Mapping[str, Shard], unit: int, degree: int) -> dict[str, Shard]:
    """A plan whose unequal parts (of MLPs, whose features are alike) end at multiples of so many features.

    Args:
        model: that it is of, in full.
        plan: its shards.
        unit: features that number formats of its weights keep together; see `Format.grid`.
        degree: over how many ranks; where some would have nothing, the plan's own units stay.
    """
    modules = dict(model.named_modules())
    found: dict[str, Shard] = dict(plan)
    for pattern, shard in plan.items():
        if shard.groups == 1 and shard.units and unit > 1:
            size: int = modules[fnmatch.filter(modules, pattern)[0]].weight.shape[shard.dim]  # type: ignore[index, union-attr, assignment]
            if size % unit == 0 and size // shard.units % unit and size // unit >= degree:
                found[pattern] = replace(shard, units=size // unit)
    return found


def whole_blocks(model: nn.Module, plan: Mapping[str, Shard]) -> dict[str, ParamShard]:
    """For a model that is not sharded: the weights whose input features are in blocks, and where those are.

    What is multiplied apart has to be stored apart where a number format cannot be cut in place.
    """
    modules = dict(model.named_modules())
    found: dict[str, ParamShard] = {}
    for pattern, shard in plan.items():
        if shard.dim == 1 and shard.blocks:
            ends = list(itertools.accumulate(shard.blocks, initial=0))
            whole = ParamShard(1, tuple(itertools.pairwise(ends)), ends[-1])
            found |= {f"{name}.weight": whole for name in fnmatch.filter(modules, pattern)}
    return found


def _shard_module(module: Model, shard: Shard, axis: Axis, name: str, table: dict[str, ParamShard]) -> nn.Module:
    kinds = (nn.RMSNorm,) if shard.style == "vector" else (nn.Linear, nn.Embedding)
    assert type(module) in kinds, f"{name} is a {type(module).__name__}"
    full: Tensor = module.weight
    size = full.shape[shard.dim]
    weight_shard = ParamShard(shard.dim, tuple(shard.ranges(size, axis, name)), size)
    table[f"{name}.weight"] = weight_shard
    weight = _own(weight_shard.take(full.detach()))
    if shard.style == "vector":
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module
    if isinstance(module, nn.Embedding):
        return ColumnParallelEmbedding(weight, axis, shard.style == "embedding")
    bias = None if module.bias is None else module.bias.detach()
    if shard.style == "row":
        return RowParallelLinear(weight, bias, axis)
    if bias is not None:
        bias_shard = ParamShard(0, weight_shard.ranges, size)
        table[f"{name}.bias"] = bias_shard
        bias = _own(bias_shard.take(bias))
    return ColumnParallelLinear(weight, bias, axis, shard.gather_output)


def _own(part: Tensor) -> Tensor:
    """A contiguous tensor with memory of its own, so that the full tensor can be freed."""
    return part.clone(memory_format=torch.contiguous_format)
