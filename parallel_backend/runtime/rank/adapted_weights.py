"""Patches of a transformer's weights on a rank: merged into plain ones, beside those that stay in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...families import Transformer
from ...loading.adapters import AdapterSet, Ranges, branch_of, patch_rows
from ...parallel.products import Adapted, Product, named_weights
from ...parallel.tensor import Model, ParamShard


class AdaptedWeights:
    """The weights of one transformer, and where each rank's slice of them is in ComfyUI's file.

    Patches name weights as the file does, which may have several of ours in one.

    Args:
        module: rank-local.
        kind: what it is.
        table: the slices that this rank holds of what is sharded.
        dtype: of what is computed.
    """

    def __init__(self, module: Model, kind: Transformer, table: Mapping[str, ParamShard], dtype: torch.dtype) -> None:
        self.module, self.kind, self.table, self.dtype = module, kind, table, dtype

    def check(self, adapters: AdapterSet) -> None:
        """Raise ValueError for a set that these weights cannot have: with how many of how many, and the first."""
        left, stuck = set(adapters.patches), []
        for name, parameter in named_weights(self.module).items():
            keys = {key for _, key, _, _ in self._pieces(name, parameter)} & adapters.patches.keys()
            left -= keys
            if isinstance(parameter, Product):
                stuck += [key for key in keys if not all(patch.low_rank() for patch in adapters.patches[key])]
        if left:
            raise ValueError(
                f"{len(left)} of {len(adapters.patches)} weights that the LoRA changes are not in the model, the first "
                f"is {min(left)}"
            )
        if stuck:
            raise ValueError(
                f"{len(stuck)} of {len(adapters.patches)} weights that the LoRA changes stay in 8 bits, which takes "
                f"plain LoRA only (not LoHa, LoKr, diff or set); the first is {min(stuck)}. Choose the weight_dtype "
                "'bfloat16' on the loader"
            )

    def merged(self, adapters: AdapterSet) -> frozenset[str]:
        """The parameters that a set changes themselves."""
        return frozenset(
            name
            for name, parameter in named_weights(self.module).items()
            if not isinstance(parameter, Product)
            and any(key in adapters.patches for _, key, _, _ in self._pieces(name, parameter))
        )

    def beside_bytes(self, adapters: AdapterSet) -> int:
        """Memory that stands beside this rank's weights in 8 bits."""
        size = 0
        for name, parameter in named_weights(self.module).items():
            if isinstance(parameter, Product):
                keys = {key for _, key, _, _ in self._pieces(name, parameter)} & adapters.patches.keys()
                rank = sum(patch.tensors[0].shape[1] for key in keys for patch in adapters.patches[key])
                size += rank * sum(parameter.shape) * self.dtype.itemsize
        return size

    def apply(self, adapters: AdapterSet) -> None:
        """Change the weights, which are as the file has them."""
        for name, parameter in named_weights(self.module).items():
            pieces = [piece for piece in self._pieces(name, parameter) if piece[1] in adapters.patches]
            if isinstance(parameter, Product):
                self._stand_beside(name, parameter, pieces, adapters)
            else:
                for local, key, row, count in pieces:
                    rows = parameter.data[local : local + count]
                    patch_rows(rows, row, self._columns(name, parameter), adapters.patches[key])

    def _stand_beside(
        self, name: str, product: Product, pieces: list[tuple[int, str, int, int]], adapters: AdapterSet
    ) -> None:
        linear = self.module.get_submodule(name.rpartition(".")[0])
        patches: dict[str, list[tuple[int, int, int]]] = {}
        for local, key, row, count in pieces:
            patches.setdefault(key, []).append((local, row, count))
        base = product.base if isinstance(product, Adapted) else product
        columns, rows = self._columns(name, base), base.shape[0]
        found = [branch_of(adapters.patches[key], of, rows, columns, self.dtype) for key, of in patches.items()]
        if not found:
            linear.hold(base)
            return
        device = base.tensors()[0].device
        down, up = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], dim=1)
        linear.hold(Adapted(base, down.to(device), up.to(device)))

    def _columns(self, name: str, parameter: Tensor | Product) -> Ranges:
        shard = self.table.get(name)
        if shard is not None and shard.dim == 1:
            return shard.ranges
        return ((0, parameter.shape[1]),) if len(parameter.shape) > 1 else ()

    def _pieces(self, name: str, parameter: Tensor | Product) -> Iterator[tuple[int, str, int, int]]:
        """Where rows of a parameter are in the file: ``(row here, key, row there, count)``."""
        shard, parts = self.table.get(name), self.kind.file_rows(name)
        rows = shard.size if shard is not None and shard.dim == 0 else parameter.shape[0]
        height, local = rows // len(parts), 0
        for first, last in shard.ranges if shard is not None and shard.dim == 0 else ((0, rows),):
            for number, (key, part, _) in enumerate(parts):
                a, b = max(first, number * height), min(last, (number + 1) * height)
                if a < b:
                    yield local + a - first, key, (part - number) * height + a, b - a
            local += last - first
