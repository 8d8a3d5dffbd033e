"""Fills a model with this rank's slices, chunk by chunk: host memory holds a few chunks, whatever the model.

Ranks that hold the same slices share the reading: each reads its part of them and broadcasts it to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from ..mesh import SINGLE, Axis
from ..parallel.tensor import ColumnParallelLinear, ParamShard, RowParallelLinear, ScaledLinear
from .safetensors_reader import StoredTensor, Weight, find_weight

FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By their names in safetensors."""
LINEARS = (nn.Linear, ColumnParallelLinear, RowParallelLinear)
CHUNK_BYTES = 64 * 2**20
"""Of a tensor, read and moved at once."""
AHEAD = 4
"""Chunks that are read while earlier ones are moved; each by a thread of its own."""


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Weight],
    table: Mapping[str, ParamShard],
    *,
    device: torch.device,
    dtype: torch.dtype,
    replicas: Axis = SINGLE,
    keep_fp8: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Fill a model on the meta device with this rank's slices. Collective over ``replicas``.

    Args:
        model: its parameters have rank-local shapes already; all of them are replaced.
        weights: parameter name -> what it is made of.
        table: parameter name -> the slice to take; parameters that are not in it are read whole.
        device, dtype: where the weights go and as what.
        keep_fp8: linears that are stored in fp8 stay so and are multiplied in the input's dtype; else as ``dtype``.
        replicas: ranks that hold the same slices as this one.
        on_bytes: told the bytes of each tensor after it is in place.

    Returns:
        Bytes of weights now held on the device.

    Raises:
        ValueError: a tensor is missing, has another shape than the model or no finite values, by name and file. Values
            are looked at by the rank that reads them; it takes part in all broadcasts before it raises.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    found: dict[str, Weight] = {}
    for name, parameter in parameters.items():
        full = list(parameter.shape)
        if name in table:
            full[table[name].dim] = table[name].size
        found[name] = find_weight(name, full, weights)
    # In the order of the files, which disks like.
    order = sorted(found, key=lambda name: str(found[name].pieces[0][0].file))
    owners = _share({name: parameters[name].numel() for name in order}, replicas.degree)
    source = _Source()
    jobs = [
        (name, start, read)
        for name in order
        if owners[name] == replicas.rank
        for start, read in source.chunks(found[name], table.get(name))
    ]
    error: ValueError | None = None
    held = 0
    with _ReadAhead(jobs) as chunks:
        for name in order:
            owner, _, leaf = name.rpartition(".")
            linear = isinstance(modules[owner], LINEARS) and leaf == "weight"
            stays = _fp8_dtype(found[name]) if keep_fp8 and linear else None
            tensor = torch.empty(parameters[name].shape, dtype=stays or dtype, device=device)
            stored_scale = found[name].scale
            scale = None if stored_scale is None else source.scalar(stored_scale).to(device)
            if owners[name] == replicas.rank:
                factor = None if stays or scale is None else scale.to(dtype)
                finite = torch.ones((), dtype=torch.bool, device=device)
                for start, chunk in chunks.of(name):
                    part = tensor[start : start + len(chunk)] if chunk.ndim else tensor
                    # Moved as it is stored, and made what it shall be there: fp8 travels as fp8.
                    moved = chunk.to(device)
                    if factor is None:
                        part.copy_(moved)
                    else:
                        torch.mul(moved.to(dtype), factor, out=part)  # in the dtype computed in, as ComfyUI does
                    finite &= (part if stays is None else part.to(dtype)).isfinite().all()
                if not finite and error is None:
                    first, _, _ = found[name].pieces[0]
                    error = ValueError(
                        f"{first.key} in {first.file} holds values that are not finite numbers; download it again"
                    )
            if replicas.is_split:
                # Backends know no fp8, but bytes.
                sent = tensor if stays is None else tensor.view(torch.uint8)
                dist.broadcast(sent, group=replicas.group, group_src=owners[name])
            if stays is None:
                setattr(modules[owner], leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                factor = torch.ones((), device=device) if scale is None else scale
                modules[owner] = _set_fp8(model, owner, tensor, factor)
            held += tensor.nbytes
            on_bytes(tensor.nbytes)
    if error is not None:
        raise error
    return held


def _fp8_dtype(weight: Weight) -> torch.dtype | None:
    """The 8-bit dtype that a parameter is stored in; None for others."""
    dtypes = {tensor.dtype for tensor, _, _ in weight.pieces}
    return FP8_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None


def _set_fp8(model: nn.Module, name: str, weight: Tensor, scale: Tensor) -> nn.Module:
    """Give a linear a weight in 8 bits and its scale; the module that stands there now."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        parent, _, leaf = name.rpartition(".")
        module = ScaledLinear(weight, scale, module.bias)
        setattr(model.get_submodule(parent), leaf, module)
    else:
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.weight_scale = scale  # type: ignore[assignment]
    return module


def _share(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which of ``parts`` readers reads each tensor: in turn the one that has the least to read so far."""
    loads, owners = [0] * parts, {}
    for name, size in sizes.items():
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners


class _Source:
    """Open files, and the chunks of what is in them."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def scalar(self, tensor: StoredTensor) -> Tensor:
        """A tensor of one element, without dims."""
        return self._open(tensor.file).get_tensor(tensor.key).reshape(())

    def chunks(self, weight: Weight, shard: ParamShard | None) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """This rank's slice of a parameter from its first row on: first row of a chunk, and how to read it."""
        if not weight.pieces[0][0].shape:
            yield 0, lambda: self.scalar(weight.pieces[0][0])
            return
        rows = weight.shape[0]
        ranges = shard.ranges if shard is not None and shard.dim == 0 else ((0, rows),)
        columns = shard.ranges if shard is not None and shard.dim == 1 else None
        row_bytes = max(1, sum(tensor.nbytes for tensor, _, _ in weight.pieces) // max(1, rows))
        step = max(1, CHUNK_BYTES // row_bytes)
        place = 0
        for first, last in ranges:
            offset = 0
            for tensor, start, stop in weight.pieces:
                begin, end = max(first, offset), min(last, offset + stop - start)
                for at in range(begin, end, step):
                    until = min(at + step, end)
                    yield place, self._reader(tensor, at - offset + start, until - offset + start, columns)
                    place += until - at
                offset += stop - start

    def _reader(
        self, tensor: StoredTensor, start: int, stop: int, columns: tuple[tuple[int, int], ...] | None
    ) -> Callable[[], Tensor]:
        def read() -> Tensor:
            stored = self._open(tensor.file).get_slice(tensor.key)
            if columns is None:
                return stored[start:stop].clone()  # of the mapped file
            return torch.cat([stored[start:stop, a:b] for a, b in columns], dim=1)

        return read

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(str(file), framework="pt")
        return self._files[file]


class _ReadAhead:
    """Reads chunks in order, a few of them before they are asked for."""

    def __init__(self, jobs: list[tuple[str, int, Callable[[], Tensor]]]) -> None:
        self._jobs = deque(jobs)
        self._pool = ThreadPoolExecutor(AHEAD)
        self._reading: deque[tuple[str, int, Future[Tensor]]] = deque()

    def __enter__(self) -> _ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The chunks of the tensor that comes next, which is ``name``."""
        while True:
            while self._jobs and len(self._reading) < AHEAD:
                job, start, read = self._jobs.popleft()
                self._reading.append((job, start, self._pool.submit(read)))
            if not self._reading or self._reading[0][0] != name:
                return
            _, start, future = self._reading.popleft()
            yield start, future.result()
