"""Patches of a module's weights on a rank: merged into plain ones, beside those that are stored in other formats.

What is switched within a run stands beside plain weights, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..mesh import Axis
from ..parallel.products import Adapted, Instead, Multiplier, Plain, Product, named_weights
from ..parallel.tensor import Model, ParamShard, hold
from .adapters import AdapterSet, Patches, Ranges, branch_of, patch_rows, same_patches, strengths_of
from .wide_adapters import LocalWeight, patch_together

RANKS = (16, 32, 64, 128, 256)
"""Ranks of what stands beside a weight: filled up to the next of these, or to a multiple of the last."""


class Piece(NamedTuple):
    """Rows of a parameter that are rows of one weight in the file."""

    local: int
    key: str
    row: int
    size: int


class On(NamedTuple):
    """Patches of one parameter, by the keys of what makes it: those in its values, and those beside it."""

    fixed: Patches = MappingProxyType({})
    beside: Patches = MappingProxyType({})


_UNKNOWN: Patches = {"": ()}


class AdaptedWeights:
    """The weights of one module, where each rank's slice of them is in ComfyUI's file, and which patches are on.

    Patches name weights as the file does, which may have several of ours in one.

    Args:
        module: rank-local, with the weights as the file has them.
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
        """As they are stored."""
        self._on: dict[str, On] = {}
        self._instead: dict[str, Instead] = {}
        self._beside: dict[str, Adapted] = {}
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

    def changed(self, adapters: AdapterSet) -> frozenset[str]:
        """The parameters whose values a set makes others of than they are."""
        found = {
            name
            for name in self._weights
            if not same_patches(self._on.get(name, On()).fixed, self._wanted(name, adapters).fixed)
        }
        # What ranks patch together is patched in all parameters that are in that weight of the file.
        while more := self._together(adapters, found) - found:
            found |= more
        return frozenset(found)

    def again(self, changed: Collection[str]) -> frozenset[str]:
        """Those that are to be read from the file again before they are changed."""
        plain = (name for name in changed if not isinstance(self._weights[name], Product))
        return frozenset(name for name in plain if self._on.get(name, On()).fixed)

    def beside_bytes(self, adapters: AdapterSet) -> int:
        """Memory that a set takes beside this rank's weights, which stay as they are."""
        size = 0
        for name, weight in self._weights.items():
            on = self._wanted(name, adapters)
            if on.beside:
                size += (_rank(on.beside) * (sum(weight.shape) + 1)) * self.dtype.itemsize
            if on.fixed and isinstance(weight, Product):
                size += weight.shape[0] * weight.shape[1] * self.dtype.itemsize
        return size

    def working_bytes(self, adapters: AdapterSet, changed: Collection[str]) -> int:
        """Memory that applying a set takes for a while: copies in fp32 of weights that ranks patch together."""
        wide = self._wide(adapters, changed).values()
        sizes = [sum(self._weights[name].shape[-1] * piece.size for name, piece in held) for held in wide]
        return 4 * max(sizes, default=0)

    def apply(self, adapters: AdapterSet, changed: Collection[str]) -> bool:
        """Change the weights, of which `again` has those of ``changed`` as the file has them. Collective over the axis.

        Returns:
            Whether some weights have other memory than before.
        """
        wide, moved = self._wide(adapters, changed), False
        values: dict[str, Tensor] = {}
        for name in self._weights:
            on = self._wanted(name, adapters)
            if name in changed:
                moved |= self._change(name, on, values, wide, adapters)
            moved |= self._stand_beside(name, on)
            self._on[name] = on
        for key in sorted(wide):
            self._patch_together(key, wide[key], values, adapters)
        return moved

    def lose_track(self, changed: Collection[str]) -> None:
        """Applying a set has failed: what of it is in place is not known."""
        for name in self._weights:
            fixed = _UNKNOWN if name in changed else self._on.get(name, On()).fixed
            self._on[name] = On(fixed, _UNKNOWN)

    def _change(
        self, name: str, on: On, values: dict[str, Tensor], wide: Collection[str], adapters: AdapterSet
    ) -> bool:
        """Patch a parameter, or what stands in its place, but for what ranks patch together; whether that is new."""
        weight, moved = self._weights[name], False
        if not isinstance(weight, Product):
            values[name] = weight.data
        elif not on.fixed:
            return self._instead.pop(name, None) is not None
        elif name in self._instead:
            values[name] = self._instead[name].weight
            values[name].copy_(weight.dense(self.dtype))
        else:
            values[name] = weight.dense(self.dtype)
            if any(values[name] is tensor for tensor in weight.tensors()):
                values[name] = values[name].clone()
            self._instead[name], moved = Instead(weight, values[name]), True
        for local, key, row, size in self._rows[name]:
            if key in on.fixed and key not in wide:
                patch_rows(values[name][local : local + size], row, self._columns(name), on.fixed[key])
        return moved

    def _stand_beside(self, name: str, on: On) -> bool:
        """Have beside a parameter what is to be there; whether that takes or gives back memory."""
        weight, now = self._weights[name], self._beside.get(name)
        base = self._instead.get(name, weight)
        if not on.beside:
            self._beside.pop(name, None)
            if isinstance(base, Product):
                self._hold(name, base)
            elif now is not None:
                self._hold(name, now.base)
            return now is not None
        if not isinstance(base, Product):
            base = Plain(base) if now is None else now.base
        patches, rank = [patch for of in on.beside.values() for patch in of], _rank(on.beside)
        device = base.tensors()[0].device
        strengths = strengths_of(patches, rank).to(device, self.dtype)
        fits = now is not None and now.down.shape[0] == rank
        if now is None or not fits or not same_patches(self._on[name].beside, on.beside, strengths=False):
            pieces: dict[str, list[tuple[int, int, int]]] = {key: [] for key in on.beside}
            for local, key, row, size in self._rows[name]:
                if key in pieces:
                    pieces[key].append((local, row, size))
            parts = [(on.beside[key], of) for key, of in pieces.items()]
            shape = base.shape
            down, up = branch_of(parts, shape, self._columns(name), rank, self.dtype, device)
            if now is None or not fits:
                self._beside[name] = Adapted(base, down, up, strengths)
                self._hold(name, self._beside[name])
                return True
            now.down.copy_(down)
            now.up.copy_(up)
        # What is compiled or recorded for that rank stays valid: the values change, and nothing else.
        now.strengths.copy_(strengths)
        now.base = base
        return False

    def _hold(self, name: str, product: Product) -> None:
        hold(self.module, name.rpartition(".")[0], product)

    def _patch_together(
        self, key: str, held: list[tuple[str, Piece]], changed: Mapping[str, Tensor], adapters: AdapterSet
    ) -> None:
        name = held[0][0]
        patches = self._wanted(name, adapters).fixed[key]
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
        patch_together(weight, patches)
        for part, values in zip(parts, weight.values.split([len(part) for part in parts]), strict=True):
            part.copy_(values)

    def _wide(self, adapters: AdapterSet, changed: Collection[str]) -> dict[str, list[tuple[str, Piece]]]:
        """Weights that ranks patch together, and what this one holds of them, of the parameters that are changed."""
        keys = _wide_keys(adapters.patches) if changed else ()
        found: dict[str, list[tuple[str, Piece]]] = {}
        for name in self._rows if keys else ():
            for piece in self._rows[name] if name in changed else ():
                if piece.key in keys:
                    found.setdefault(piece.key, []).append((name, piece))
        return found

    def _together(self, adapters: AdapterSet, names: Collection[str]) -> set[str]:
        """Parameters that have a part of a weight which ranks patch together, and some of ``names`` another."""
        if not names:
            return set()
        on = {name: {piece.key for piece in pieces} for name, pieces in self._rows.items()}
        before = {key for one in self._on.values() for key in _wide_keys(one.fixed)}
        keys = (_wide_keys(adapters.patches) | before) & {key for name in names for key in on[name]}
        return {name for name, of in on.items() if of & keys}

    def _wanted(self, name: str, adapters: AdapterSet) -> On:
        """What of a set is to be in the values of a parameter, and what beside it."""
        of = {piece.key: adapters.patches[piece.key] for piece in self._rows[name] if piece.key in adapters.patches}
        if not of:
            return On()
        weight, patches = self._weights[name], [patch for key in of for patch in of[key]]
        if isinstance(weight, Product) and all(patch.low_rank() for patch in patches):
            return On({}, of)
        switched = {key: found for key in of if (found := [patch for patch in of[key] if patch.switched])}
        if not switched or not all(patch.low_rank() for key in switched for patch in switched[key]):
            return On(of, {})
        linear = self.module.get_submodule(name.rpartition(".")[0])
        if not isinstance(linear, nn.Linear | Multiplier):
            return On(of, {})
        return On({key: found for key in of if (found := [patch for patch in of[key] if not patch.switched])}, switched)

    def _columns(self, name: str) -> Ranges:
        shard, shape = self.table.get(name), self._weights[name].shape
        if shard is not None and shard.dim == 1:
            return shard.ranges
        return ((0, shape[1]),) if len(shape) > 1 else ()


def _wide_keys(patches: Patches) -> set[str]:
    return {key for key, of in patches.items() if any(patch.wide() for patch in of)}


def _rank(patches: Patches) -> int:
    """Of the matrices that stand beside a weight for so many patches."""
    return _filled_up(sum(patch.rank for of in patches.values() for patch in of))


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
