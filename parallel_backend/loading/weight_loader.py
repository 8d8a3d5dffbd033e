"""Fills a model with this rank's slices, piece by piece: host memory holds a few pieces, whatever the model.

Ranks that hold the same slices share the reading: each reads its part of them and broadcasts it to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import SINGLE, Axis
from ..parallel.tensor import ParamShard
from .file_reader import FileReader
from .safetensors_reader import StoredTensor, Weight
from .staging import Ring
from .targets import not_finite, targets_of

FP8_MODES = ("matmul", "stored", "cast")
"""What becomes of quantized weights; see `load_weights`."""
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
        fp8: of linears that are stored in 8 bits or in one of `FORMATS`: ``"cast"``, they are held as ``dtype``;
            ``"stored"``, they stay as they are and are multiplied in the input's dtype; ``"matmul"``, they stay, and
            those that the file is made for are multiplied as they are, where the device has units for that and shape
            and ``dtype`` suit them. What is cut off its format's grid is held as ``dtype``.
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
    targets = targets_of(model, weights, table, dtype, device, keep_fp8=fp8 != "cast")
    if again is not None:
        targets = [target for target in targets if target.name in again]
        for target in targets:
            target.tensor = model.get_parameter(target.name).data
    owners = share({target.name: target.read_bytes for target in targets}, replicas.degree)
    mine = [target for target in targets if owners[target.name] == replicas.rank]
    errors: list[ValueError] = []
    finite: list[tuple[StoredTensor, Tensor]] = []
    held = 0
    with FileReader() as reader, Ring((job for target in mine for job in target.jobs()), reader.read, device) as ring:
        for target in targets:
            sent = target.to_send()
            try:
                target.begin(reader)
                if owners[target.name] == replicas.rank and not errors:
                    target.fill(ring)
                    finite += [(stored, _is_finite(numbers)) for stored, numbers in target.numbers()]
            except ValueError as error:
                errors.append(error)
            if replicas.is_split:
                dist.broadcast(sent, group=replicas.group, group_src=owners[target.name])
            target.install(model, fp8 == "matmul", in_place=again is not None)
            held += target.nbytes
            on_bytes(target.nbytes)
        # One look at all flags: only here does the host wait for a GPU.
        verdicts = torch.stack([flag for _, flag in finite]).tolist() if finite else []
    for (stored, _), is_finite in zip(finite, verdicts, strict=True):
        if not is_finite:
            errors.append(not_finite(stored))
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
    targets = targets_of(model, weights, table, dtype, torch.device("meta"), keep_fp8=fp8 != "cast")
    return sum(target.nbytes for target in targets)


def share(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which of ``parts`` readers (or keepers) has each tensor: in turn the one that has the least so far."""
    loads, owners = [0] * parts, {}
    for name, size in sizes.items():
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners


def _is_finite(tensor: Tensor) -> Tensor:
    """Whether all values are finite numbers, as a flag on the tensor's device; without memory of the tensor's size."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    limit = _FIRST_NOT_FINITE.get(tensor.dtype, 0)
    if not limit and tensor.dtype != torch.float8_e8m0fnu:
        return torch.stack(torch.aminmax(tensor)).isfinite().all()
    # Of an 8-bit format's positive numbers the bits are the largest when read as signed, of the others as unsigned.
    bits = tensor.view(torch.uint8)
    if tensor.dtype == torch.float8_e8m0fnu:
        return bits.amax() < 0xFF
    return (bits.view(torch.int8).amax() < limit) & (bits.amax() < limit + 0x80)
