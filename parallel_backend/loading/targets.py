"""What a model's parameters are filled with on a rank: plain ones, those in 8 bits with a scale, and quantized ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..parallel.fp8 import Fp8, can_multiply, has_fp8_units
from ..parallel.products import Multiplier
from ..parallel.quantized import has_units
from ..parallel.tensor import ParamShard, hold
from .file_reader import FileReader, Ranges, Slice, merged, runs
from .quantized_weight import QuantizedSlice
from .safetensors_reader import DTYPES, FP8_DTYPES, StoredTensor, Weight, find_weight
from .staging import BUFFER_BYTES, Job, Ring

LINEARS = (nn.Linear, Multiplier)


@dataclass
class Target:
    """A parameter that is to be filled, stored as numbers, or as such of 8 bits with a scale.

    Args:
        name: of the parameter.
        weight: what it is made of.
        shard: the slice of it that this rank holds; None for all.
        shape: of that slice.
        dtype, device: how and where it is held.
        in_fp8: whether it is the weight of a linear that stays in 8 bits.
        units_for: dtype of the inputs that it is multiplied with.
        tensor: its memory, from `allocate` on.
        scale, input_scale: of 8 bits, once they are read.
    """

    name: str
    weight: Weight
    shard: ParamShard | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    in_fp8: bool
    units_for: torch.dtype
    tensor: Tensor | None = None
    scale: float | Tensor | None = None
    input_scale: float | None = None

    @property
    def nbytes(self) -> int:
        """That it holds."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """About those that are read for it."""
        return self.shape.numel()

    def to_send(self) -> Tensor:
        """What replicas have in common; backends know no fp8, but bytes."""
        return self.allocate().view(torch.uint8) if self.in_fp8 else self.allocate()

    def begin(self, reader: FileReader) -> None:
        """Read its scales."""
        self.scale, self.input_scale = _scale(reader, self), _scalar(reader, self.weight.input_scale)

    def numbers(self) -> list[tuple[StoredTensor, Tensor]]:
        """What has to be finite."""
        return [(self.weight.pieces[0][0], self.allocate())]

    def allocate(self) -> Tensor:
        """Its memory, the same each time."""
        if self.tensor is None:
            self.tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.tensor

    def jobs(self) -> Iterator[Job]:
        """What is to be read for it, in order. On the CPU, bytes that stay as they are go straight to their place."""
        first = 0
        for part in _slices(self.weight, self.shard):
            stored = DTYPES[part.tensor.dtype]
            count = part.nbytes // stored.itemsize
            into = None
            if self.device.type == "cpu" and stored == self.dtype and (self.in_fp8 or self.weight.scale is None):
                into = self.allocate().view(-1)[first : first + count].view(torch.uint8)
            yield Job(self.name, part, first, into)
            first += count

    def fill(self, ring: Ring) -> None:
        """Take what the ring has read for it. Bytes travel as they are stored, and are cast and scaled there."""
        flat, scale = self.allocate().view(-1), self.scale
        factor = None
        if isinstance(scale, float) and not self.in_fp8:
            factor = torch.tensor(scale, dtype=torch.float64).to(self.dtype).item()  # rounded first, as ComfyUI does
        for job, data in ring.of(self.name):
            if job.into is None:
                stored = data.view(DTYPES[job.part.tensor.dtype])
                place = flat[job.first : job.first + len(stored)]
                if stored.dtype == place.dtype:
                    place.copy_(stored, non_blocking=True)
                else:
                    place.copy_(stored.to(self.device, non_blocking=True))
                if factor is not None:
                    place.mul_(factor)
        if isinstance(scale, Tensor) and not self.in_fp8:
            self.allocate().mul_(scale.to(self.device, self.dtype))

    def install(self, model: nn.Module, units: bool, in_place: bool) -> None:
        """Put it in its place; on a linear that stays in 8 bits a product, with its scales (1 for None)."""
        if in_place:
            return
        if not self.in_fp8:
            _set(model, self.name, self.allocate())
            return

        def on_device(value: float) -> Tensor:
            return torch.full((), value, dtype=torch.float32, device=self.device)  # without waiting for a copy

        weight, scale = nn.Parameter(self.allocate(), requires_grad=False), self.scale
        units = units and self.weight.fp8_matmul and has_fp8_units(self.device) and can_multiply(weight, self.units_for)
        if isinstance(scale, Tensor):
            # ComfyUI, too, has no product in 8 bits for scales of rows.
            hold(model, self.name.rpartition(".")[0], Fp8(weight, scale.to(self.device)))
        else:
            alpha = 1.0 if scale is None else scale
            inputs = on_device(self.input_scale or 1.0) if units else None
            hold(model, self.name.rpartition(".")[0], Fp8(weight, on_device(alpha), alpha, inputs))


@dataclass
class QuantizedTarget:
    """A weight in one of `FORMATS` that is to be filled.

    Args:
        name, weight, shape, device: as those of `Target`.
        part: what of it is read.
        dtype: that it is held as where it is made dense.
        stays: whether it stays quantized.
        tensor: memory that is to be filled anew, where it is made dense.
    """

    name: str
    weight: Weight
    part: QuantizedSlice
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stays: bool
    tensor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """That it holds."""
        return self.part.nbytes if self.stays else self.shape.numel() * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """That are read for it."""
        return self.part.nbytes

    def jobs(self) -> Iterator[Job]:
        """What is to be read for it, in order."""
        return self.part.jobs(self.device, BUFFER_BYTES)

    def to_send(self) -> Tensor:
        """What replicas have in common."""
        return self.part.allocate(self.device)

    def begin(self, reader: FileReader) -> None:
        """All that it has is read by jobs."""

    def fill(self, ring: Ring) -> None:
        """Take what the ring has read for it."""
        self.part.fill(ring)

    def numbers(self) -> list[tuple[StoredTensor, Tensor]]:
        """What has to be finite."""
        return self.part.numbers()

    def install(self, model: nn.Module, units: bool, in_place: bool) -> None:
        """Put it in its place: a product where it stays quantized."""
        layer = self.part.layer
        if self.stays:
            native = units and layer.matmul and has_units(layer.format, self.device)
            hold(model, self.name.rpartition(".")[0], self.part.product(native))
            return
        if self.tensor is None:
            self.tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.part.dense_in(self.tensor)
        self.part.free()
        if not in_place:
            _set(model, self.name, self.tensor)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter in its place."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def targets_of(
    model: nn.Module,
    weights: Mapping[str, Weight],
    table: Mapping[str, ParamShard],
    dtype: torch.dtype,
    device: torch.device,
    keep_fp8: bool,
) -> list[Target | QuantizedTarget]:
    """A model's parameters in the order of the files, which disks like; ValueError as `find_weight`."""
    modules = dict(model.named_modules())
    targets: list[Target | QuantizedTarget] = []
    for name, parameter in model.named_parameters():
        shard = table.get(name)
        full = list(parameter.shape)
        if shard is not None:
            full[shard.dim] = shard.size
        weight = find_weight(name, full, weights)
        owner, _, leaf = name.rpartition(".")
        of_linear = keep_fp8 and leaf == "weight" and isinstance(modules[owner], LINEARS)
        if weight.layer is not None:
            part = QuantizedSlice(name, weight, shard)
            stays = of_linear and part.on_grid
            targets.append(QuantizedTarget(name, weight, part, parameter.shape, dtype, device, stays))
            continue
        stored = {tensor.dtype for tensor, _, _ in weight.pieces}
        in_fp8 = of_linear and len(stored) == 1 and stored <= FP8_DTYPES.keys()
        held_as = FP8_DTYPES[stored.pop()] if in_fp8 else dtype
        targets.append(Target(name, weight, shard, parameter.shape, held_as, device, in_fp8, dtype))
    return sorted(targets, key=lambda target: _place_in_files(target.weight))


def _place_in_files(weight: Weight) -> tuple[str, int]:
    tensor, _, _ = weight.pieces[0]
    return str(tensor.file), tensor.offset


def _slices(weight: Weight, shard: ParamShard | None) -> Iterator[Slice]:
    """What makes this rank's slice of a parameter, from its first row on, in parts of a buffer's size at most.

    (A row of columns is not cut further: it can be longer.)
    """
    if not weight.pieces[0][0].shape:
        tensor, _, _ = weight.pieces[0]
        yield Slice(tensor, 0, tensor.nbytes)
        return
    ranges = shard.ranges if shard is not None and shard.dim == 0 else ((0, weight.shape[0]),)
    for first, last in ranges:
        offset = 0
        for tensor, start, stop in weight.pieces:
            begin, end = max(first, offset) - offset + start, min(last, offset + stop - start) - offset + start
            row = tensor.nbytes // max(1, tensor.shape[0])
            columns: Ranges = ()
            if shard is not None and shard.dim == 1:
                column = row // shard.size
                columns = merged((a * column, b * column) for a, b in shard.ranges)
                columns = () if columns == ((0, row),) else columns
            yield from runs(tensor, ((begin, end),), row, columns, BUFFER_BYTES)
            offset += stop - start


def _scale(reader: FileReader, target: Target) -> float | Tensor | None:
    """What this rank's slice is multiplied by: a number, or one for each of its rows, fp32 ``[rows, 1]`` on the CPU."""
    stored, shard = target.weight.scale, target.shard
    if stored is None or math.prod(stored.shape) == 1:
        return _scalar(reader, stored)
    rows = reader.whole(stored).float().reshape(-1, 1)
    if not rows.isfinite().all():
        raise not_finite(stored)
    full = torch.cat([rows[start:stop] for _, start, stop in target.weight.pieces])
    return shard.take(full) if shard is not None and shard.dim == 0 else full


def _scalar(reader: FileReader, stored: StoredTensor | None) -> float | None:
    """The value of a scale; ValueError where it is no finite number."""
    if stored is None:
        return None
    value = reader.scalar(stored)
    if not math.isfinite(value):
        raise not_finite(stored)
    return value


def not_finite(stored: StoredTensor) -> ValueError:
    return ValueError(f"{stored.key} in {stored.file} holds values that are not finite numbers; download it again")
