"""Reading safetensors by slice: a rank takes its rows and columns of each tensor and never holds a whole model."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..parallel.tensor import ParamShard


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: its file, full shape and size in bytes."""

    file: Path
    shape: tuple[int, ...]
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        ValueError: the file is missing, is no safetensors file, or is shorter than its header says.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing; download the model again or restore this file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"{file} ({size} bytes) is not a safetensors file, or was cut off; download it again")
        try:
            header = json.loads(stream.read(length))
            entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
            tensors = {
                key: StoredTensor(file, tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
                for key, entry in entries.items()
            }
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{file} has an unreadable safetensors header ({error!r}); download it again") from None
    if 8 + length + end != size:
        raise ValueError(
            f"{file} has {size} bytes but its header describes {8 + length + end}: it was cut off or damaged; "
            "download it again"
        )
    return tensors


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a component folder (one safetensors file, or several with an index).

    Raises:
        ValueError: there are no safetensors files, or one that the index names is missing or damaged.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text())["weight_map"].values())
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{indexes[0]} is not an index of weight files ({error!r}); download it again") from None
        files = [folder / name for name in sorted(names)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; other formats are not read")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file))
    return tensors


def find_stored(
    name: str, shape: Sequence[int], stored: Mapping[str, StoredTensor], keys: Mapping[str, str]
) -> StoredTensor:
    """Where the tensor that a model calls ``name``, of full ``shape``, is stored.

    Args:
        name, shape: of the model's parameter or buffer.
        stored: what the files hold.
        keys: the model's names -> keys in the files.

    Raises:
        ValueError: it is not there, or has another shape, by name and file.
    """
    found = stored.get(keys.get(name, ""))
    if found is None:
        files = ", ".join(sorted({entry.file.name for entry in stored.values()}))
        raise ValueError(f"the weights have no tensor {name} (looked in {files}); the checkpoint is incomplete")
    if list(found.shape) != list(shape):
        raise ValueError(
            f"{keys[name]} in {found.file} has shape {list(found.shape)}, but the model's configuration makes it "
            f"{list(shape)}; the checkpoint and its config.json do not belong together"
        )
    return found


def load_weights(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    keys: Mapping[str, str],
    table: Mapping[str, ParamShard],
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Fill a model on the meta device with this rank's slices.

    Args:
        model: its parameters have rank-local shapes already; all of them are replaced.
        stored: what the files hold.
        keys: parameter name -> key in the files.
        table: parameter name -> the slice to take; parameters that are not in it are read whole.
        device, dtype: where the weights go and as what.
        on_bytes: told the bytes of each tensor after it is in place.

    Returns:
        Bytes of weights now held on the device.

    Raises:
        ValueError: a tensor is missing or has another shape than the model, by name and file.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        full = list(parameter.shape)
        if name in table:
            full[table[name].dim] = table[name].size
        by_file[find_stored(name, full, stored, keys).file].append(name)
    modules = dict(model.named_modules())
    held = 0
    for file, names in by_file.items():
        with safe_open(str(file), framework="pt") as reader:
            for name in names:
                source = reader.get_slice(keys[name])
                shard = table.get(name)
                tensor = shard.take(source) if shard else source[:]
                # A copy even where nothing changes: the result must not lean on the mapped file.
                tensor = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
                owner, _, leaf = name.rpartition(".")
                setattr(modules[owner], leaf, nn.Parameter(tensor, requires_grad=False))
                held += tensor.nbytes
                on_bytes(tensor.nbytes)
    return held
