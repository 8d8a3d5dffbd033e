"""Fills a model with this rank's slices, piece by piece: host memory holds a few pieces, whatever the model.

Ranks that hold the same slices share the reading: each reads its part of them and broadcasts it to the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import SINGLE, Axis
from ..parallel.fp8 import Fp8, can_multiply, has_fp8_units
from ..parallel.products import Multiplier
from ..parallel.tensor import ParamShard, WholeLinear
from .file_reader import FileReader, Slice
from .safetensors_reader import DTYPES, FP8_DTYPES, StoredTensor, Weight, find_weight
from .staging import BUFFER_BYTES, Job, Ring

LINEARS = (nn.Linear, Multiplier)
FP8_MODES = ("matmul", "stored", "cast")
"""What becomes of weights that are stored in fp8; see `load_weights`."""
_FIRST_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The lowest bits, without the sign, that are no finite number; all above are none, either."""


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Weight],
    table: Mapping[str, ParamShard],
    *,
    device: torch.device,
    dtype: torch.dtype,
    replicas: Axis = SINGLE,
    fp8: str = "cast",
    on_bytes: Callable[[int], None] = lambda count: None,
    again: Collection[str] | None = None,
) -> int:
    """Fill a model on the meta device with this rank's slices. Collective over ``replicas``.

    Args:
        model: its parameters have rank-local shapes already; all of them are replaced.
        weights: parameter name -> what it is made of.
        table: parameter name -> the slice to take; parameters that are not in it are read whole.
        device, dtype: where the weights go and as what.
        fp8: of linears that are stored in 8 bits: ``"cast"``, they are held as ``dtype``; ``"stored"``, they stay as
            they are and are multiplied in the input's dtype; ``"matmul"``, they stay, and those that the file is made
            for are multiplied by the GPU's fp8 units, where it has some and shape and ``dtype`` suit them.
        replicas: ranks that hold the same slices as this one.
        again: parameters that are in place, and of which only the values are read anew; None: all are to be made.
        on_bytes: told the bytes of each tensor after it is in place (on a GPU: after the last copy to it is queued).

    Returns:
        Bytes of weights now held on the device.

    Raises:
        ValueError: a tensor is missing, has another shape than the model or no finite values, or cannot be read; by
            name and file. A tensor is read, and its values are looked at, by one of the replicas, which takes part in
            all broadcasts before it raises.
    """
    assert fp8 in FP8_MODES, fp8
    targets = _targets(model, weights, table, dtype, device, keep_fp8=fp8 != "cast")
    if again is not None:
        targets = [target for target in targets if target.name in again]
        for target in targets:
            target.tensor = model.get_parameter(target.name).data
    owners = _share({target.name: target.shape.numel() for target in targets}, replicas.degree)
    mine = [target for target in targets if owners[target.name] == replicas.rank]
    use_units = fp8 == "matmul" and has_fp8_units(device)
    errors: list[ValueError] = []
    finite: list[tuple[_Target, Tensor]] = []
    held = 0
    with FileReader() as reader, Ring((job for target in mine for job in target.jobs()), reader.read, device) as ring:
        for target in targets:
            tensor = target.allocate()
            scale: float | Tensor | None = None
            input_scale: float | None = None
            try:
                scale, input_scale = _scale(reader, target), _scalar(reader, target.weight.input_scale)
                if owners[target.name] == replicas.rank and not errors:
                    target.fill(ring, scale)
                    finite.append((target, _is_finite(tensor)))
            except ValueError as error:
                errors.append(error)
            if replicas.is_split:
                # Backends know no fp8, but bytes.
                sent = tensor.view(torch.uint8) if target.in_fp8 else tensor
                dist.broadcast(sent, group=replicas.group, group_src=owners[target.name])
            units = use_units and target.weight.fp8_matmul and can_multiply(tensor, dtype)
            units = units and not isinstance(scale, Tensor)  # ComfyUI, too, has no product for scales of rows
            if again is None:
                _install(model, target, scale, (input_scale or 1.0) if units else None)
            held += tensor.nbytes
            on_bytes(tensor.nbytes)
        # One look at all flags: only here does the host wait for a GPU.
        verdicts = torch.stack([flag for _, flag in finite]).tolist() if finite else []
    for (target, _), is_finite in zip(finite, verdicts, strict=True):
        if not is_finite:
            errors.append(_not_finite(target.weight.pieces[0][0]))
    if errors:
        raise errors[0]
    return held


def shard_bytes(
    model: nn.Module,
    weights: Mapping[str, Weight],
    table: Mapping[str, ParamShard],
    dtype: torch.dtype,
    fp8: str = "cast",
) -> int:
    """What `load_weights` would return for the same arguments; nothing is read.

    Raises:
        ValueError: a tensor is missing or has another shape than the model, by name and file.
    """
    targets = _targets(model, weights, table, dtype, torch.device("meta"), keep_fp8=fp8 != "cast")
    return sum(target.shape.numel() * target.dtype.itemsize for target in targets)


@dataclass
class _Target:
    """A parameter that is to be filled.

    Args:
        name: of the parameter.
        weight: what it is made of.
        shard: the slice of it that this rank holds; None for all.
        shape: of that slice.
        dtype, device: how and where it is held.
        in_fp8: whether it is the weight of a linear that stays in 8 bits.
        tensor: its memory, from `allocate` on.
    """

    name: str
    weight: Weight
    shard: ParamShard | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    in_fp8: bool
    tensor: Tensor | None = None

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

    def fill(self, ring: Ring, scale: float | Tensor | None) -> None:
        """Take what the ring has read for it. Bytes travel as they are stored, and are cast and scaled there."""
        flat = self.allocate().view(-1)
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


def _targets(
    model: nn.Module,
    weights: Mapping[str, Weight],
    table: Mapping[str, ParamShard],
    dtype: torch.dtype,
    device: torch.device,
    keep_fp8: bool,
) -> list[_Target]:
    """A model's parameters in the order of the files, which disks like; ValueError as `find_weight`."""
    modules = dict(model.named_modules())
    targets = []
    for name, parameter in model.named_parameters():
        shard = table.get(name)
        full = list(parameter.shape)
        if shard is not None:
            full[shard.dim] = shard.size
        weight = find_weight(name, full, weights)
        owner, _, leaf = name.rpartition(".")
        stored = {tensor.dtype for tensor, _, _ in weight.pieces}
        in_fp8 = (
            keep_fp8 and leaf == "weight" and isinstance(modules[owner], LINEARS)
            and len(stored) == 1 and stored <= FP8_DTYPES.keys()
        )  # fmt: skip
        held_as = FP8_DTYPES[stored.pop()] if in_fp8 else dtype
        targets.append(_Target(name, weight, shard, parameter.shape, held_as, device, in_fp8))
    return sorted(targets, key=lambda target: _place_in_files(target.weight))


def _place_in_files(weight: Weight) -> tuple[str, int]:
    tensor, _, _ = weight.pieces[0]
    return str(tensor.file), tensor.offset


def _share(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which of ``parts`` readers reads each tensor: in turn the one that has the least to read so far."""
    loads, owners = [0] * parts, {}
    for name, size in sizes.items():
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners


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
            columns: tuple[tuple[int, int], ...] = ()
            step = BUFFER_BYTES // 16 * 16  # of a run, whose parts may end within a row, but not within a number
            if shard is not None and shard.dim == 1:
                column = row // shard.size
                columns = tuple((a * column, b * column) for a, b in shard.ranges)
                step = max(1, BUFFER_BYTES // max(1, sum(b - a for a, b in columns))) * row
            for at in range(begin * row, end * row, max(1, step)):
                yield Slice(tensor, at, min(at + step, end * row), row, columns)
            offset += stop - start


def _scale(reader: FileReader, target: _Target) -> float | Tensor | None:
    """What this rank's slice is multiplied by: a number, or one for each of its rows, fp32 ``[rows, 1]`` on the CPU."""
    stored, shard = target.weight.scale, target.shard
    if stored is None or math.prod(stored.shape) == 1:
        return _scalar(reader, stored)
    rows = reader.whole(stored).float().reshape(-1, 1)
    if not rows.isfinite().all():
        raise _not_finite(stored)
    full = torch.cat([rows[start:stop] for _, start, stop in target.weight.pieces])
    return shard.take(full) if shard is not None and shard.dim == 0 else full


def _scalar(reader: FileReader, stored: StoredTensor | None) -> float | None:
    """The value of a scale; ValueError where it is no finite number."""
    if stored is None:
        return None
    value = reader.scalar(stored)
    if not math.isfinite(value):
        raise _not_finite(stored)
    return value


def _not_finite(stored: StoredTensor) -> ValueError:
    return ValueError(f"{stored.key} in {stored.file} holds values that are not finite numbers; download it again")


def _is_finite(tensor: Tensor) -> Tensor:
    """Whether all values are finite numbers, as a flag on the tensor's device; without memory of the tensor's size."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    limit = _FIRST_NOT_FINITE.get(tensor.dtype)
    if limit is None:
        return torch.stack(torch.aminmax(tensor)).isfinite().all()
    # Of an 8-bit format's positive numbers the bits are the largest when read as signed, of the others as unsigned.
    bits = tensor.view(torch.uint8)
    return (bits.view(torch.int8).amax() < limit) & (bits.amax() < limit + 0x80)


def _install(model: nn.Module, target: _Target, scale: float | Tensor | None, input_scale: float | None) -> None:
    """Put a parameter in its place; on a linear that stays in 8 bits a product, with its scales (1 for None)."""
    owner, _, leaf = target.name.rpartition(".")
    module, parameter = model.get_submodule(owner), nn.Parameter(target.allocate(), requires_grad=False)
    if not target.in_fp8:
        setattr(module, leaf, parameter)
        return

    def on_device(value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float32, device=target.device)  # without waiting for a copy

    inputs = None if input_scale is None else on_device(input_scale)
    if isinstance(scale, Tensor):
        product = Fp8(parameter, scale.to(target.device), None, inputs)
    else:
        alpha = 1.0 if scale is None else scale
        product = Fp8(parameter, on_device(alpha), alpha, inputs)
    if isinstance(module, Multiplier):
        module.hold(product)
    else:
        parent, _, name = owner.rpartition(".")
        setattr(model.get_submodule(parent), name, WholeLinear(product, module.bias))  # type: ignore[arg-type]
