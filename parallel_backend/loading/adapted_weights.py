"""Patches of a module's weights on a rank: merged into plain ones, beside those that are stored in other formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..mesh import Axis
from ..parallel.products import Adapted, Instead, Product, named_weights
from ..parallel.tensor import Model, ParamShard
from .adapters import AdapterSet, Ranges, branch_of, patch_rows
from .wide_adapters import LocalWeight, patch_together

RANKS = (16, 32, 64, 128, 256)
"""Ranks of what stands beside a weight: filled up to the next of these, or to a multiple of the last."""


class Piece(NamedTuple):
    """Rows of a parameter that are rows of one weight in the file."""

    local: int
    key: str
    row: int
    size: int


class AdaptedWeights:
    """The weights of one module, and where each rank's slice of them is in ComfyUI's file.

    Patches name weights as the file does, which may have several of ours in one.

    Args:
        module: rank-local.
        file_rows: for a parameter's name what makes it, as `Transformer.file_rows` says.
        table: the slices that this rank holds of what is sharded.
        axis: the ranks among which it is.
        dtype: of what is computed.
    """

    def __init__(
        self,
        module: Model,
        file_rows: Callable[[str], tuple[tuple[str, int, int], ...]],
        table: Mapping[str, ParamShard],
        axis: Axis,
        dtype: torch.dtype,
    ) -> None:
        self.module, self.table, self.axis, self.dtype = module, table, axis, dtype
        self._weights = named_weights(module)
        self._rows: dict[str, list[Piece]] = {}
        self._heights: dict[str, int] = {}
        """Rows of each weight in the file."""
        for name, weight in self._weights.items():
            parts, shard = file_rows(name), table.get(name)
            size = shard.size if shard is not None and shard.dim == 0 else weight.shape[0] if weight.shape else 1
            self._rows[name] = list(_pieces(parts, shard, size))
            self._heights |= {key: size // len(parts) * count for key, _, count in parts}

    def check(self, adapters: AdapterSet) -> None:
        """Raise ValueError for a set that these weights cannot have: how many of how many, and the first."""
        left = set(adapters.patches) - self._heights.keys()
        if left and self._rows:  # or it is on another rank
            raise ValueError(
                f"{len(left)} of {len(adapters.patches)} weights that the LoRA changes are not in the model, the first "
                f"is {min(left)}"
            )

    def merged(self, adapters: AdapterSet) -> frozenset[str]:
        """The parameters that a set changes themselves."""
        plain = (name for name, weight in self._weights.items() if not isinstance(weight, Product))
        return frozenset(name for name in plain if self._keys(name, adapters))

    def beside_bytes(self, adapters: AdapterSet) -> int:
        """Memory that a set takes beside this rank's weights, which stay as they are."""
        size = 0
        for name, weight in self._weights.items():
            keys = self._keys(name, adapters) if isinstance(weight, Product) else ()
            if keys and self._is_low_rank(name, adapters):
                rank = sum(patch.tensors[0].shape[1] for key in keys for patch in adapters.patches[key])
                size += _filled_up(rank) * sum(weight.shape) * self.dtype.itemsize
            elif keys:
                size += weight.shape[0] * weight.shape[1] * self.dtype.itemsize
        return size

    def working_bytes(self, adapters: AdapterSet) -> int:
        """Memory that applying a set takes for a while: copies in fp32 of weights that ranks patch together."""
        wide = self._wide(adapters).values()
        sizes = [sum(self._weights[name].shape[-1] * piece.size for name, piece in held) for held in wide]
        return 4 * max(sizes, default=0)

    def apply(self, adapters: AdapterSet) -> bool:
        """Change the weights, of which the plain ones are as the file has them. Collective over the axis.

        Returns:
            Whether some weights have other memory than before.
        """
        wide, moved = self._wide(adapters), False
        changed: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            pieces = [piece for piece in self._rows[name] if piece.key in adapters.patches]
            if isinstance(weight, Product):
                base = weight.base if isinstance(weight, Adapted | Instead) else weight
                if not pieces or self._is_low_rank(name, adapters):
                    moved |= self._stand_beside(name, weight, base, pieces, adapters)
                    continue
                changed[name], moved = self._instead(name, base), True
            elif pieces:
                changed[name] = weight.data
            for local, key, row, size in pieces:
                if key not in wide:
                    rows = changed[name][local : local + size]
                    patch_rows(rows, row, self._columns(name), adapters.patches[key])
        for key in sorted(wide):
            self._patch_together(key, wide[key], changed, adapters)
        return moved

    def _patch_together(
        self, key: str, held: list[tuple[str, Piece]], changed: Mapping[str, Tensor], adapters: AdapterSet
    ) -> None:
        name = held[0][0]
        shard, columns = self.table.get(name), self._columns(name)
        parts = [changed[one][at.local : at.local + at.size] for one, at in held]
        weight = LocalWeight(
            torch.cat([part.float() for part in parts]),
            torch.cat([torch.arange(at.row, at.row + at.size) for _, at in held]),
            torch.cat([torch.arange(a, b) for a, b in columns]),
            self._heights[key],
            self.axis,
            None if shard is None else shard.dim,
        )
        patch_together(weight, adapters.patches[key])
        for part, values in zip(parts, weight.values.split([len(part) for part in parts]), strict=True):
            part.copy_(values)

    def _wide(self, adapters: AdapterSet) -> dict[str, list[tuple[str, Piece]]]:
        """Weights that ranks patch together, and what this one holds of them."""
        keys = {key for key, of in adapters.patches.items() if any(patch.wide() for patch in of)}
        found: dict[str, list[tuple[str, Piece]]] = {}
        for name, pieces in self._rows.items() if keys else ():
            for piece in pieces:
                if piece.key in keys:
                    found.setdefault(piece.key, []).append((name, piece))
        return found

    def _stand_beside(
        self, name: str, product: Product, base: Product, pieces: list[Piece], adapters: AdapterSet
    ) -> bool:
        """Whether there is something beside it, or not, that was not before; else what is there has new values."""
        linear = self.module.get_submodule(name.rpartition(".")[0])
        if not pieces:
            linear.hold(base)
            return product is not base
        patches: dict[str, list[tuple[int, int, int]]] = {}
        for local, key, row, size in pieces:
            patches.setdefault(key, []).append((local, row, size))
        columns, rows = self._columns(name), base.shape[0]
        found = [branch_of(adapters.patches[key], of, rows, columns, self.dtype) for key, of in patches.items()]
        down, up = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], dim=1)
        # Of rows and columns that are zero nothing is seen, and what is compiled or recorded for a rank stays valid.
        more = _filled_up(len(down)) - len(down)
        down = torch.cat([down, down.new_zeros(more, down.shape[1])])
        up = torch.cat([up, up.new_zeros(rows, more)], dim=1)
        if isinstance(product, Adapted) and product.down.shape == down.shape:
            product.down.copy_(down)
            product.up.copy_(up)
            return False
        device = base.tensors()[0].device
        linear.hold(Adapted(base, down.to(device), up.to(device)))
        return True

    def _instead(self, name: str, base: Product) -> Tensor:
        """The weight as it is stored, in the place of what it is stored as; to be patched."""
        weight = base.dense(self.dtype)
        if any(weight is tensor for tensor in base.tensors()):
            weight = weight.clone()
        self.module.get_submodule(name.rpartition(".")[0]).hold(Instead(base, weight))
        return weight

    def _keys(self, name: str, adapters: AdapterSet) -> set[str]:
        return {piece.key for piece in self._rows[name]} & adapters.patches.keys()

    def _is_low_rank(self, name: str, adapters: AdapterSet) -> bool:
        return all(patch.low_rank() for key in self._keys(name, adapters) for patch in adapters.patches[key])

    def _columns(self, name: str) -> Ranges:
        shard, shape = self.table.get(name), self._weights[name].shape
        if shard is not None and shard.dim == 1:
            return shard.ranges
        return ((0, shape[1]),) if len(shape) > 1 else ()


def _filled_up(rank: int) -> int:
    """The class of a rank; see `RANKS`."""
    return next((one for one in RANKS if rank <= one), -(-rank // RANKS[-1]) * RANKS[-1])


def _pieces(parts: tuple[tuple[str, int, int], ...], shard: ParamShard | None, size: int) -> Iterator[Piece]:
    """Where rows of a parameter, of so many in full, are in the file."""
    height, local = size // len(parts), 0
    for first, last in shard.ranges if shard is not None and shard.dim == 0 else ((0, size),):
        for number, (key, part, _) in enumerate(parts):
            a, b = max(first, number * height), min(last, (number + 1) * height)
            if a < b:
                yield Piece(local + a - first, key, (part - number) * height + a, b - a)
        local += last - first
