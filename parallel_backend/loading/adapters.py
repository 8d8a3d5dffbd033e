"""Patches of weights (LoRA and the like) as a graph gives them, and what they make of a slice of a weight.

A rank never has a full weight of a sharded layer: most kinds are exact on any rows and columns of it, and for the
others ranks exchange little (`wide_adapters`). Formulas and their order are ComfyUI's (`comfy.lora.calculate_weight`).

* LoRA (arXiv:2106.09685): ``up @ down``; LoCon adds a middle, which is multiplied into ``down`` before.
* LoHa (FedPara, arXiv:2108.06098): ``(a1 @ b1) * (a2 @ b2)``.
* LoKr (arXiv:2212.10650, LyCORIS): the Kronecker product of two matrices.
* GLoRA (arXiv:2306.07967): ``W @ a1 @ a2 + b1 @ b2``.
* OFT (arXiv:2306.07280): blocks of rows of W are rotated.
* DoRA (arXiv:2402.09353), on top of any of them: rows or columns of the sum get lengths of their own.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 8 * 2**20
"""Weights that are patched at a time, in fp32: 32 MiB."""
KINDS = {"lora": 2, "loha": 4, "lokr": 2, "glora": 4, "oft": 1, "diff": 1, "set": 1, "scale": 0}
"""Kinds of patches, and how many tensors each has."""
OF_WEIGHT = ("glora", "oft")
"""Those that add something which depends on the weight."""
ALIGNMENT = 64
Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Patch:
    """One change of a weight ``[rows, columns]``, or of a vector.

    Args:
        kind: one of `KINDS`; ``"scale"`` only scales.
        tensors: ``up [rows, r], down [r, columns]``; ``a1, b1, a2, b2`` of LoHa; the two factors of LoKr;
            ``b1, b2, a1, a2`` of GLoRA; the rotations ``[blocks, size, size]`` of OFT, by which rows are multiplied
            from the right; what is added (``diff``) or put in its place (``set``).
        strength: times which what is added goes in, its alpha over its rank included.
        model_strength: what the weight is multiplied by before.
        offset: ``(dim, start, length)`` of the part that is changed; None for all of it.
        swap: whether the halves of the rows of what is added change places.
        dora: lengths of the rows ``[rows, 1]`` or of the columns ``[1, columns]`` of the sum. The weight then goes so
            far towards it as ``strength`` says.
        alpha: times which what is added goes into that sum.
        switched: whether it comes and goes within a run, with each evaluation perhaps. It comes after all that do not.
    """

    kind: str
    tensors: tuple[Tensor, ...]
    strength: float = 1.0
    model_strength: float = 1.0
    offset: tuple[int, int, int] | None = None
    swap: bool = False
    dora: Tensor | None = None
    alpha: float = 1.0
    switched: bool = False

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless it fits a weight of a shape, with both shapes."""
        changed = list(shape)
        if self.offset is not None:
            dim, start, length = self.offset
            if dim >= len(changed) or start + length > changed[dim]:
                raise ValueError(f"changes {length} from {start} on of dim {dim} of a weight {list(shape)}")
            changed[dim] = length
        if self.kind == "scale":
            return
        if self.kind == "oft":
            if len(changed) != 2 or self.shape[0] != changed[0]:
                raise ValueError(f"rotates {self.shape[0]} rows, the model has {changed}")
        elif self.shape != tuple(changed):
            raise ValueError(f"has the shape {list(self.shape)}, the model {changed}")
        if self.kind == "glora" and (self.tensors[2].shape[0], self.tensors[3].shape[1]) != (changed[1], changed[1]):
            inner = [self.tensors[2].shape[0], self.tensors[3].shape[1]]
            raise ValueError(f"multiplies columns by {inner}, the model has {changed}")
        if self.dora is not None and tuple(self.dora.shape) not in ((changed[0], 1), (1, *changed[1:])):
            raise ValueError(f"has lengths {list(self.dora.shape)} (dora_scale) for rows or columns of {changed}")

    @property
    def all_tensors(self) -> tuple[Tensor, ...]:
        """Its `tensors`, and `dora` where it has that."""
        return self.tensors if self.dora is None else (*self.tensors, self.dora)

    @property
    def rank(self) -> int:
        """Of a product of thin matrices."""
        return self.tensors[0].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it adds."""
        first, *others = self.tensors
        if self.kind in ("lora", "loha", "glora"):
            return first.shape[0], others[0].shape[1]
        if self.kind == "oft":
            return (first.shape[0] * first.shape[1],)
        if self.kind == "lokr":
            return first.shape[0] * others[0].shape[0], first.shape[1] * others[0].shape[1]
        return tuple(first.shape)

    def part(self, rows: Tensor, columns: slice | Tensor, device: torch.device) -> Tensor:
        """What it adds to rows (by number) and columns of the weight, in fp32, without its strength.

        Of GLoRA what does not depend on the weight; of OFT there is none.
        """

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, torch.float32)

        if self.swap:
            half = self.shape[0] // 2
            rows = torch.where(rows < half, rows + half, rows - half)
        first, *others = self.tensors
        if self.kind in ("lora", "glora"):
            return moved(first[rows]) @ moved(others[0][:, columns])
        if self.kind == "loha":
            b1, a2, b2 = others
            return (moved(first[rows]) @ moved(b1[:, columns])) * (moved(a2[rows]) @ moved(b2[:, columns]))
        if self.kind == "lokr":
            (second,) = others
            height, width = second.shape
            if isinstance(columns, slice):
                columns = torch.arange(columns.start, columns.stop)
            outer, inner = moved(first[rows // height]), moved(second[rows % height])
            return outer[:, columns // width] * inner[:, columns % width]
        return moved(first[rows] if first.ndim == 1 else first[rows][:, columns])

    def low_rank(self) -> bool:
        """Whether it is a product of two thin matrices, which can stand beside a weight that is not touched."""
        return self.kind == "lora" and self.model_strength == 1.0 and self.dora is None

    def same_but_strength(self, other: Patch) -> bool:
        """Whether another one has the very same tensors, and differs in its strength at most."""
        if not all(a is b for a, b in itertools.zip_longest(self.all_tensors, other.all_tensors)):
            return False
        return self == replace(other, strength=self.strength, tensors=self.tensors, dora=self.dora)

    def wide(self) -> bool:
        """Whether what it does to a slice depends on more of the weight than that slice; see `wide_adapters`."""
        return self.dora is not None or self.kind in OF_WEIGHT


@dataclass(frozen=True)
class AdapterSet:
    """All patches of a model at once.

    Args:
        name: tells sets apart.
        patches: the file's names of weights -> their patches, in order.
        title: for people: files and strengths.
    """

    name: str
    patches: Mapping[str, Sequence[Patch]] = field(default_factory=dict)
    title: str = ""

    def same_but_strengths(self, other: AdapterSet) -> bool:
        """Whether another set has the very same tensors for the same weights, in other strengths at most."""
        return same_patches(self.patches, other.patches, strengths=False)


Patches = Mapping[str, Sequence[Patch]]


def same_patches(some: Patches, others: Patches, strengths: bool = True) -> bool:
    """Whether patches by key are the same, whatever their strengths if those do not matter."""
    if some.keys() != others.keys():
        return False
    pairs = [(a, b) for key, of in some.items() for a, b in itertools.zip_longest(of, others[key])]
    return all(
        a is not None and b is not None and a.same_but_strength(b) and not (strengths and a.strength != b.strength)
        for a, b in pairs
    )


NO_ADAPTERS = AdapterSet("")
"""The weights as their file has them."""


def patch_rows(weight: Tensor, first: int, columns: Ranges, patches: Sequence[Patch]) -> None:
    """Patch some rows of a weight in place: summed in fp32, rounded once.

    Args:
        weight: ``[rows, columns of all ranges]`` of it, or ``[rows]`` of a vector.
        first: number of the first row.
        columns: ranges of the full weight's columns, one after the other.
        patches: in order.
    """
    width = weight[0].numel() if weight.ndim > 1 else 1
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for at in range(0, weight.shape[0], step):
        chunk = weight[at : at + step]
        exact = chunk.float() if chunk.dtype != torch.float64 else chunk.clone()
        for patch in patches:
            _patch_chunk(exact, first + at, columns, patch)
        chunk.copy_(exact)


def _patch_chunk(chunk: Tensor, first: int, columns: Ranges, patch: Patch) -> None:
    dim, start, length = patch.offset or (0, 0, first + chunk.shape[0])
    a, b = first, first + chunk.shape[0]
    if dim == 0:
        a, b = max(a, start), min(b, start + length)
    if a >= b:
        return
    rows = torch.arange(a, b) - (start if dim == 0 else 0)
    place = 0
    for c0, c1 in columns if chunk.ndim > 1 else ((0, 1),):
        x0, x1 = (max(c0, start), min(c1, start + length)) if dim == 1 else (c0, c1)
        if x0 < x1:
            part = chunk[a - first : b - first]
            if chunk.ndim > 1:
                part = part[:, place + x0 - c0 : place + x1 - c0]
            shift = start if dim == 1 else 0
            _patch_part(part, rows, slice(x0 - shift, x1 - shift), patch)
        place += c1 - c0


def _patch_part(part: Tensor, rows: Tensor, columns: slice, patch: Patch) -> None:
    assert not patch.wide()
    if patch.model_strength != 1.0:
        part.mul_(patch.model_strength)
    if patch.kind == "scale":
        return
    added = patch.part(rows, columns, part.device).reshape(part.shape)
    if patch.kind == "set":
        part.copy_(added)
    else:
        part.add_(patch.strength * added)


def branch_of(
    parts: Sequence[tuple[Sequence[Patch], Sequence[tuple[int, int, int]]]],
    shape: tuple[int, int],
    columns: Ranges,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Low-rank patches of a slice of a weight as one product beside it: ``(x @ down.T * strengths) @ up.T``.

    Args:
        parts: patches, of which each is `Patch.low_rank`, and ``(row of the slice, row of the weight, count)`` of where
            the slice's rows are in the weight that they are for.
        shape: of the slice.
        columns: of the slice, as ranges of the weight's.
        rank: of both matrices, at least the sum of the patches'; what is left is zero.
        dtype, device: of both matrices.

    Returns:
        ``down [rank, columns]`` and ``up [rows, rank]``; `strengths_of` has the third.
    """
    up = torch.zeros(shape[0], rank, dtype=dtype, device=device)
    down = torch.zeros(rank, shape[1], dtype=dtype, device=device)
    at = 0
    for patch, pieces in ((patch, pieces) for patches, pieces in parts for patch in patches):
        dim, start, length = patch.offset or (0, 0, patch.shape[0])
        first, second = patch.tensors
        inner = slice(at, at + patch.rank)
        if patch.swap:
            first = torch.cat(first.chunk(2)[::-1])
        for local, row, count in pieces:
            a, b = (max(row, start), min(row + count, start + length)) if dim == 0 else (row, row + count)
            if a < b:
                shift = start if dim == 0 else 0
                up[local + a - row : local + b - row, inner] = first[a - shift : b - shift].to(device, dtype)
        place = 0
        for c0, c1 in columns:
            x0, x1 = (max(c0, start), min(c1, start + length)) if dim == 1 else (c0, c1)
            if x0 < x1:
                shift = start if dim == 1 else 0
                down[inner, place + x0 - c0 : place + x1 - c0] = second[:, x0 - shift : x1 - shift].to(device, dtype)
            place += c1 - c0
        at += patch.rank
    return down, up


def strengths_of(patches: Sequence[Patch], rank: int) -> Tensor:
    """What stands between the two matrices of `branch_of` is multiplied by it: fp32 ``[rank]``."""
    each = torch.zeros(rank)
    ranks = torch.tensor([patch.rank for patch in patches])
    each[: int(ranks.sum())] = torch.tensor([patch.strength for patch in patches]).repeat_interleave(ranks)
    return each


def described(adapters: AdapterSet, name_of: Callable[[Tensor], str]) -> dict[str, Any]:
    """A set as JSON can hold it, with names in the place of tensors."""
    return {
        key: [
            [
                p.kind,
                [name_of(tensor) for tensor in p.all_tensors],
                p.strength,
                p.model_strength,
                p.offset,
                p.swap,
                p.alpha,
                p.switched,
            ]
            for p in patches
        ]
        for key, patches in adapters.patches.items()
    }


def from_description(name: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterSet:
    """The way back; ValueError for what is no such description."""
    try:
        patches: dict[str, list[Patch]] = {}
        for key, stated in description.items():
            patches[key] = []
            for one in stated:
                if len(one) != 8:
                    raise ValueError(f"a patch of {len(one)} fields")
                kind, names, strength, model_strength, offset, swap, alpha, switched = one
                found, count = tuple(tensors[one] for one in names), KINDS[kind]
                if len(found) not in (count, count + 1):
                    raise ValueError(f"{len(found)} tensors of a patch of kind {kind}")
                place = None if offset is None else (int(offset[0]), int(offset[1]), int(offset[2]))
                dora = found[count] if len(found) > count else None
                numbers = float(strength), float(model_strength)
                patches[key].append(
                    Patch(kind, found[:count], *numbers, place, bool(swap), dora, float(alpha), bool(switched))
                )
        return AdapterSet(name, patches)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"what arrived describes no patches ({error!r})") from None


def packed(description: Mapping[str, Any], new: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A description and new tensors as ``index`` and ``data`` of the message `Adapt`: bytes ``[N]`` each."""
    places, parts, size = {}, [], 0
    for name, tensor in new.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        places[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size]
        parts += [raw, torch.zeros(-raw.numel() % ALIGNMENT, dtype=torch.uint8)]
        size += parts[-2].numel() + parts[-1].numel()
    text = json.dumps({"patches": description, "new": places}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8), torch.cat(parts) if parts else torch.empty(0)


def unpacked(index: Tensor, data: Tensor | None, known: dict[str, Tensor]) -> dict[str, Any]:
    """The description that `packed` was given; its new tensors are added to those that are ``known``.

    Raises:
        ValueError: the bytes are none that it makes.
    """
    try:
        content = json.loads(index.numpy().tobytes())
        for name, (dtype, shape, offset) in content["new"].items():
            kind = getattr(torch, dtype)
            size = math.prod(shape) * kind.itemsize
            if data is None or not 0 <= offset <= offset + size <= len(data):
                raise ValueError(f"the tensor {name} is not in what arrived")
            known[name] = data[offset : offset + size].view(kind).view(shape)
        return content["patches"]
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"what arrived describes no patches ({error!r})") from None
