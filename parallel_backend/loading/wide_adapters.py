"""Patches whose effect on a slice of a weight depends on more of it: DoRA, GLoRA and OFT on what ranks hold each.

Ranks sum what little they need of each other: lengths of rows or columns (DoRA), a product of as many columns as the
adapter has ranks (GLoRA), or some columns at a time of all rows (OFT). None of them ever holds a full weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import SINGLE, Axis
from .adapters import CHUNK_ELEMENTS, Patch

EPS = torch.finfo(torch.float32).eps
"""What ComfyUI adds to lengths that it divides by, where weights are patched in fp32."""


@dataclass(frozen=True)
class LocalWeight:
    """The slice of one weight of the file that a rank holds, in fp32.

    Args:
        values: ``[rows, columns]``.
        rows, columns: int64; which of the file's they are, on the CPU.
        height: rows of the file's weight.
        axis: the ranks among which the weight is split.
        dim: along which; None where each holds all of it.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor
    height: int
    axis: Axis = SINGLE
    dim: int | None = None

    def summed(self, value: Tensor, dim: int) -> Tensor:
        """Over all ranks what each summed along a dim of its own; as it is where that dim is whole on each."""
        if self.dim == dim and self.axis.is_split:
            dist.all_reduce(value, group=self.axis.group)
        return value

    def counts(self) -> Tensor:
        """1 for rows of this rank, fp32 ``[rows]``; 0 for those that a rank before it holds, too. Collective."""
        if self.dim != 0 or not self.axis.is_split:
            return torch.ones(len(self.rows), device=self.values.device)
        first = torch.full((self.height,), self.axis.degree, device=self.values.device)
        first[self.rows.to(first.device)] = self.axis.rank
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self.axis.group)
        return (first[self.rows.to(first.device)] == self.axis.rank).float()


def patch_together(weight: LocalWeight, patches: Sequence[Patch]) -> None:
    """Patch a slice of a weight in place. Collective over the weight's axis: all ranks give the same patches.

    Args:
        weight: the slice.
        patches: in order, of any kind.
    """
    counts = weight.counts()
    for patch in patches:
        _patch(weight, counts, patch)


def _patch(weight: LocalWeight, counts: Tensor, patch: Patch) -> None:
    dim, start, length = patch.offset or (0, 0, weight.height)
    rows, columns = ((at >= start) & (at < start + length) if dim == d else torch.ones(len(at), dtype=torch.bool)
                     for d, at in enumerate((weight.rows, weight.columns)))  # fmt: skip
    here, there = rows.nonzero().flatten().to(counts.device), columns.nonzero().flatten().to(counts.device)
    # Of the file's rows and columns, as those of what is changed.
    numbers = weight.rows[rows] - (start if dim == 0 else 0), weight.columns[columns] - (start if dim == 1 else 0)
    height, whole = length if dim == 0 else weight.height, bool(rows.all() and columns.all())
    values = weight.values if whole else weight.values[here][:, there]
    part = LocalWeight(values.mul_(patch.model_strength), *numbers, height, weight.axis, weight.dim)
    if patch.kind == "oft":
        _rotate(part, counts[here], patch)
    elif patch.kind != "scale":
        _add(part, counts[here], patch)
    if not whole:
        weight.values[here[:, None], there] = part.values


def _add(part: LocalWeight, counts: Tensor, patch: Patch) -> None:
    """Add what is a sum of products, in chunks of rows."""
    values, device = part.values, part.values.device
    inner = None
    if patch.kind == "glora":
        entrance, exit_ = (tensor.to(device, torch.float32) for tensor in patch.tensors[2:])
        inner = part.summed(values @ entrance[part.columns.to(device)], 1), exit_[:, part.columns.to(device)]
    step = max(1, CHUNK_ELEMENTS // max(1, values.shape[1]))
    chunks = [slice(at, at + step) for at in range(0, len(values), step)]

    def added(chunk: slice) -> Tensor:
        delta = patch.part(part.rows[chunk], part.columns, device)
        return delta if inner is None else delta.addmm_(inner[0][chunk], inner[1])

    lengths = None
    if patch.dora is not None and _of_rows(patch, part.height):
        lengths = _row_lengths(part)
    elif patch.dora is not None:
        squares = torch.zeros(values.shape[1], device=device)
        for chunk in chunks:
            squares += counts[chunk] @ (values[chunk] + patch.alpha * added(chunk)).square_()
        lengths = part.summed(squares, 0).sqrt_()[None]
    for chunk in chunks:
        if patch.kind == "set":
            values[chunk] = added(chunk)
        elif lengths is None:
            values[chunk] += patch.strength * added(chunk)
        else:
            _decompose(values[chunk], patch.alpha * added(chunk), lengths, part, chunk, slice(None), patch)


def _rotate(part: LocalWeight, counts: Tensor, patch: Patch) -> None:
    """Rotate blocks of rows, in chunks of columns of which each rank sees all rows for a moment."""
    values, device = part.values, part.values.device
    turn = patch.tensors[0].to(device, torch.float32)
    turn = turn - torch.eye(turn.shape[1], device=device)
    rows = part.rows.to(device)
    lengths = _row_lengths(part) if patch.dora is not None and _of_rows(patch, part.height) else None
    step, width = max(1, CHUNK_ELEMENTS // max(1, part.height)), values.shape[1]
    for at in range(0, width, step):
        chunk = slice(at, at + step)
        full = torch.zeros(part.height, values[:, chunk].shape[1], device=device)
        full[rows] = values[:, chunk] * counts[:, None]
        part.summed(full, 0)
        delta = torch.einsum("bnm,bnc->bmc", turn, full.view(*turn.shape[:2], -1)).reshape_as(full)
        if patch.dora is None:
            values[:, chunk] += patch.strength * delta[rows]
            continue
        delta *= patch.alpha
        norms = (full + delta).norm(dim=0, keepdim=True) if lengths is None else lengths
        _decompose(values[:, chunk], delta[rows], norms, part, slice(None), chunk, patch)


def _of_rows(patch: Patch, height: int) -> bool:
    """Whether a DoRA has lengths of rows; ComfyUI decides so."""
    assert patch.dora is not None
    return patch.dora.shape[0] == height


def _row_lengths(part: LocalWeight) -> Tensor:
    """Of the weight as it is, ``[rows, 1]``."""
    return part.summed(part.values.square().sum(dim=1, keepdim=True), 1).sqrt_()


def _decompose(
    values: Tensor, delta: Tensor, lengths: Tensor, part: LocalWeight, rows: slice, columns: slice, patch: Patch
) -> None:
    """DoRA's step, of some rows and columns of a part; lengths are of all rows, or of these columns."""
    assert patch.dora is not None
    wanted = patch.dora.to(values.device, torch.float32)
    if _of_rows(patch, part.height):
        wanted, lengths = wanted[part.rows[rows].to(values.device)], lengths[rows]
    else:
        wanted = wanted[:, part.columns[columns].to(values.device)]
    changed = (values + delta) * (wanted / (lengths + EPS))
    if patch.strength == 1.0:
        values.copy_(changed)
    else:
        values.add_(changed - values, alpha=patch.strength)
