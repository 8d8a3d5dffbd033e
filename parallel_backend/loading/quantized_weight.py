"""A quantized weight on a rank: which bytes of its tensors make this rank's slice, and the product of that.

Where a cut runs along a format's grid (`Format.grid`), each tensor is cut as its `Part` says, and the slice stays
quantized. Elsewhere what is around the slice is read, made dense, and cut then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.formats import FORMATS, TILE_BLOCKS, TILE_ROWS, Part
from ..parallel.kitchen import kitchen
from ..parallel.products import Product
from ..parallel.quantized import Layout, Quantized, SideBySide
from ..parallel.tensor import ParamShard
from .file_reader import Ranges, Slice, merged, runs
from .safetensors_reader import DTYPES, StoredLayer, StoredTensor, Weight
from .staging import Job, Ring

ALIGNMENT = 256
"""Of each tensor in the memory that a weight's tensors share."""
CHUNK_ELEMENTS = 32 * 2**20
"""Weights that are made dense at a time."""


@dataclass(frozen=True)
class Block:
    """Rows and columns of a stored weight, on its format's grid.

    Args:
        rows, columns: which of the stored weight; the rows stand one after the other.
        inside: the first row and column of them that are this rank's.
        place: what of this rank's slice they are: rows and columns.
    """

    rows: Ranges
    columns: tuple[int, int]
    inside: tuple[int, int]
    place: tuple[tuple[int, int], tuple[int, int]]


def blocks_of(weight: Weight, shard: ParamShard | None) -> tuple[list[Block], bool]:
    """What this rank's slice is made of, and whether that is on the grid, so that it can stay quantized."""
    layer = weight.layer
    assert layer is not None
    all_rows, all_columns = layer.shape
    row_grid, column_grid = FORMATS[layer.format].grid(layer.options)
    rows = stored_rows(weight, shard)
    columns = shard.ranges if shard is not None and shard.dim == 1 else ((0, all_columns),)
    on_rows = _on_grid(rows, row_grid, all_rows)
    on_grid = on_rows and all(_on_grid((part,), column_grid, all_columns) for part in columns)
    blocks, row = [], 0
    for group in [rows] if on_rows else [(part,) for part in rows]:
        count, column = sum(b - a for a, b in group), 0
        around = group if on_rows else (_around(group[0], row_grid, all_rows),)
        for first, end in columns:
            a, b = _around((first, end), column_grid, all_columns)
            place = (row, row + count), (column, column + end - first)
            blocks.append(Block(around, (a, b), (group[0][0] - around[0][0], first - a), place))
            column += end - first
        row += count
    return blocks, on_grid


def column_unit(weights: Iterable[Weight]) -> int:
    """Columns that a model's weights keep together, as far as its features can be cut there: 1 where none are."""
    layers = [weight.layer for weight in weights if weight.layer is not None]
    return max((FORMATS[layer.format].grid(layer.options)[1] for layer in layers), default=1)


def stored_rows(weight: Weight, shard: ParamShard | None) -> Ranges:
    """The rows of the tensor that a weight's pieces are of, which this rank holds; neighbours are one range."""
    found: list[tuple[int, int]] = []
    for first, last in shard.ranges if shard is not None and shard.dim == 0 else ((0, weight.shape[0]),):
        offset = 0
        for _, start, stop in weight.pieces:
            found.append((max(first, offset) - offset + start, min(last, offset + stop - start) - offset + start))
            offset += stop - start
    return merged(found)


def _on_grid(ranges: Ranges, unit: int, size: int) -> bool:
    last = ranges[-1][1] if ranges else 0
    return all(a % unit == 0 and (b % unit == 0 or b == last == size) for a, b in ranges)


def _around(part: tuple[int, int], unit: int, size: int) -> tuple[int, int]:
    return part[0] // unit * unit, min(size, -(-part[1] // unit) * unit)


class QuantizedSlice:
    """This rank's slice of a quantized weight, while it is read: all of its tensors in one piece of memory.

    Args:
        name: of the parameter.
        weight: what it is made of.
        shard: the slice; None for all.
    """

    def __init__(self, name: str, weight: Weight, shard: ParamShard | None) -> None:
        assert weight.layer is not None
        self.name, self.layer = name, weight.layer
        self.blocks, self.on_grid = blocks_of(weight, shard)
        self._memory: Tensor | None = None
        self._parts: list[_StoredPart] = []
        offset = 0
        for block in self.blocks:
            for part, tensor in self.layer.parts.items():
                self._parts.append(_StoredPart(self.layer, part, tensor, block, offset))
                offset += -(-self._parts[-1].nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = offset
        """Of all tensors."""

    def allocate(self, device: torch.device) -> Tensor:
        """The memory of all tensors, ``uint8 [nbytes]``; the same each time."""
        if self._memory is None:
            self._memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return self._memory

    def jobs(self, device: torch.device, buffer_bytes: int) -> Iterator[Job]:
        """What is to be read, in order; on the CPU it goes straight to its place."""
        for part in self._parts:
            first = part.offset
            for piece in part.slices(buffer_bytes):
                into = self.allocate(device)[first : first + piece.nbytes] if device.type == "cpu" else None
                yield Job(self.name, piece, first, into)
                first += piece.nbytes

    def fill(self, ring: Ring) -> None:
        """Take what the ring has read."""
        assert self._memory is not None
        for job, data in ring.of(self.name):
            if job.into is None:
                self._memory[job.first : job.first + len(data)].copy_(data, non_blocking=True)

    def numbers(self) -> list[tuple[StoredTensor, Tensor]]:
        """The tensors that have to hold finite numbers, as they are stored."""
        assert self._memory is not None
        found = [(part.tensor, part.stored(self._memory)) for part in self._parts]
        return [(tensor, numbers) for tensor, numbers in found if numbers.is_floating_point()]

    def product(self, native: bool) -> Product:
        """Of the slice, which is on the grid."""
        products = self._products(native)
        return products[0] if len(products) == 1 else SideBySide(products)

    def dense_in(self, out: Tensor) -> None:
        """Put the slice as numbers into ``out``; block by block, some rows at a time."""
        for block, product in zip(self.blocks, self._products(False), strict=True):
            (top, bottom), (left, right) = block.place
            row, column = block.inside
            step = max(TILE_ROWS, CHUNK_ELEMENTS // max(1, product.shape[1]) // TILE_ROWS * TILE_ROWS)
            for first in range(row // step * step, row + bottom - top, step):
                end = min(first + step, product.shape[0])
                a, b = max(first, row), min(end, row + bottom - top)
                rows = product.rows(first, end).dense(out.dtype)[a - first : b - first]
                out[top + a - row : top + b - row, left:right] = rows[:, column : column + right - left]

    def free(self) -> None:
        """Let go of the memory; nothing is read after that."""
        self._memory = None

    def _products(self, native: bool) -> list[Quantized]:
        assert self._memory is not None
        kitchen()  # now, and not in the first step
        layout = Layout(self.layer.format, self.layer.options, tuple(self.layer.parts), native)
        count = len(self.layer.parts)
        held = [part.held(self._memory) for part in self._parts]
        return [Quantized(layout, held[i : i + count]) for i in range(0, len(held), count)]


class _StoredPart:
    """What a block takes of one tensor: ranges of bytes of ranges of its rows."""

    def __init__(self, layer: StoredLayer, name: str, tensor: StoredTensor, block: Block, offset: int) -> None:
        self.name, self.tensor, self.offset = name, tensor, offset
        rule = self.rule = FORMATS[layer.format].parts[name]
        self._outer, self._row_bytes, self._inner, self._shape = _cut(tensor, rule, layer, block)
        self.nbytes = sum(b - a for a, b in self._outer) * (
            sum(b - a for a, b in self._inner) if self._inner else self._row_bytes
        )

    def slices(self, buffer_bytes: int) -> Iterator[Slice]:
        """Of a buffer's size at most, but for single rows."""
        return runs(self.tensor, self._outer, self._row_bytes, self._inner, buffer_bytes)

    def stored(self, memory: Tensor) -> Tensor:
        """As the file has it; bytes as what they stand for."""
        dtype = DTYPES[self.tensor.dtype]
        if dtype == torch.uint8:
            dtype = DTYPES[self.rule.dtypes[0]]
        return memory[self.offset : self.offset + self.nbytes].view(dtype).view(self._shape)

    def held(self, memory: Tensor) -> Tensor:
        """As `Quantized` takes it: numbers of 32 bits where a format has such, scales of a power of two as bytes."""
        stored = self.stored(memory)
        if stored.dtype == torch.float8_e8m0fnu:
            return stored.view(torch.uint8)
        return stored.float() if self.rule.dtypes[0] == "F32" else stored


def _cut(
    tensor: StoredTensor, rule: Part, layer: StoredLayer, block: Block
) -> tuple[Ranges, int, Ranges, tuple[int, ...]]:
    """Of a tensor: which of its rows, of how many bytes, which bytes of those (none: all), and the shape of that."""
    numel, columns = math.prod(tensor.shape), rule.columns_of(layer.options)
    item = tensor.nbytes // max(1, numel)
    if not tensor.shape or numel == 1 or not (rule.rows or columns):
        return ((0, 1),), tensor.nbytes, (), () if numel == 1 else tensor.shape
    first, end = block.columns
    across = (first // columns, -(-end // columns)) if columns else (0, 0)
    if not rule.rows:
        return (across,), item, (), (across[1] - across[0],)
    down = tuple((a // rule.rows, -(-b // rule.rows)) for a, b in block.rows)
    count = sum(b - a for a, b in down)
    if rule.turned:
        inner = tuple((a * item, b * item) for a, b in down)
        row_bytes = tensor.nbytes // tensor.shape[0]
        return (across,), row_bytes, _unless_all(inner, row_bytes), (across[1] - across[0], count)
    row_bytes = tensor.nbytes // -(-layer.shape[0] // rule.rows)
    if not columns:
        # One for each row stands beside the weight as a column.
        return down, row_bytes, (), (count, 1) if rule.beside_rows else (count,)
    width = (across[1] - across[0]) * rule.run
    inner = ((across[0] * rule.run * item, across[1] * rule.run * item),)
    shape = (count * TILE_ROWS, width // TILE_ROWS) if rule.run > 1 else (count, width)
    assert rule.run in (1, TILE_ROWS * TILE_BLOCKS)
    return down, row_bytes, _unless_all(inner, row_bytes), shape


def _unless_all(inner: Ranges, row_bytes: int) -> Ranges:
    return () if inner == ((0, row_bytes),) else inner
