"""What safetensors files hold, from their headers alone, and what a model's weights are made of."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..families.others import CONTENTS, INSTEAD, SUFFIXES
from ..parallel.formats import FORMATS
from .config_files import MAX_BYTES, parse_object, read_object

FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""By their names in safetensors."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E8M0": torch.float8_e8m0fnu,
    **FP8_DTYPES,
}
"""What is read, by their names in safetensors; a file may hold others that nothing needs."""
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", *FP8_DTYPES)
"""What weights may be stored as."""
MAX_DIMS = 16
MAX_KEY = 300
"""Characters of a tensor's name: errors have it in them."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Args:
        file, key: its name.
        shape: in full.
        nbytes: its size.
        dtype: as safetensors calls it.
        offset: bytes of the file before it.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    nbytes: int
    dtype: str
    offset: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        ValueError: the file is missing, cannot be read, is no safetensors file, or is not as its header says: it has
            another size, tensors overlap or leave holes, or one's size is not that of its shape and dtype.
    """
    size, length, header = _read_json_header(file)
    data = 8 + length
    tensors, end = {}, 0
    try:
        stored = [_entry(file, key, entry, data) for key, entry in header.items() if key != "__metadata__"]
        for tensor in sorted(stored, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != data + end:
                raise ValueError(f"{tensor.key} is at byte {tensor.offset - data}, after {end}")
            tensors[tensor.key] = tensor
            end += tensor.nbytes
    except (ValueError, TypeError, LookupError) as error:
        raise _unreadable(file, error) from None
    if data + end != size:
        raise ValueError(
            f"{file} has {size} bytes but its header describes {data + end}: it was cut off or damaged; "
            "download it again"
        )
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors.

    Raises:
        ValueError: as `read_header`.
    """
    metadata: dict[str, str] = _read_json_header(file)[2].get("__metadata__", {})
    return metadata


def _entry(file: Path, key: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    """A tensor as the header describes it; ValueError, TypeError or LookupError where that makes no sense."""
    if len(key) > MAX_KEY:
        raise ValueError(f"a tensor has a name of {len(key)} characters")
    (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not isinstance(dtype, str):
        raise ValueError(f"{key} has the shape {str(shape)[:100]} and the dtype {str(dtype)[:100]}")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in (start, stop, stop - start, *shape)):
        raise ValueError(f"{key} has the shape {shape} and the bytes {start} to {stop}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise ValueError(f"{key} has {stop - start} bytes for {shape} of {dtype}")
    return StoredTensor(file, key, tuple(shape), stop - start, dtype, data + start)


def _read_json_header(file: Path) -> tuple[int, int, dict[str, Any]]:
    """The file's length and the header's, in bytes, and the header."""
    if not os.path.isfile(file):
        link = f": it is a link to {os.readlink(file)}, which is not there" if os.path.islink(file) else ""
        raise ValueError(f"{file} is missing{link}; download the model again or restore this file")
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(9)
            length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
            if not 2 <= length <= min(size - 8, MAX_BYTES) or start[8:] != b"{":
                for begin, look in CONTENTS.items():
                    if start.startswith(begin):
                        what = f"is not a safetensors file but {look.name}; {look.remedy}"
                        raise ValueError(f"{file} ({size} bytes) {what}")
                raise ValueError(f"{file} ({size} bytes) is not a safetensors file, or was cut off; download it again")
            text = start[8:] + stream.read(length - 1)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from None
    try:
        header = parse_object(text)
        said = header.get("__metadata__", {})
        if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
            raise ValueError("its __metadata__ is no object of texts")
        for word in (*header, *said, *said.values()):
            word.encode()  # JSON can spell what is no text
        return size, length, header
    except ValueError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ValueError:
    # An error of decoding has all of the header in it.
    return ValueError(f"{file} has an unreadable safetensors header ({str(error)[:300]}); download it again")


def index_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a component folder (one safetensors file, or several with an index).

    Raises:
        ValueError: there are no safetensors files, one that the index names is missing or damaged or not in the folder.
    """
    # Not what is hidden: some systems put a file of their own beside each.
    indexes = sorted(folder.glob("[!.]*.safetensors.index.json"))
    if indexes:
        stated = read_object(indexes[0], "the model is incomplete").get("weight_map")
        names: list[Any] = list(stated.values()) if isinstance(stated, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{indexes[0]} is not an index of weight files beside it; download it again")
        files = [folder / name for name in sorted(set(names))]
    else:
        files = sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        others = sorted({SUFFIXES[file.suffix] for file in folder.glob("*.*") if file.suffix in SUFFIXES})
        found = f" (but {' and '.join(others)})" if others else ""
        raise ValueError(f"{folder} holds no .safetensors file{found}; other formats are not read: {INSTEAD}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors.update(read_header(file))
    return tensors


@dataclass(frozen=True)
class StoredLayer:
    """A quantized weight as a file has it.

    Args:
        format: one of `FORMATS`.
        options: what the file says of it, complete.
        parts: its tensors by the names that the format has for them, the weight first.
        matmul: whether the file is made for multiplying it as it is.
    """

    format: str
    options: Mapping[str, Any]
    parts: Mapping[str, StoredTensor]
    matmul: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight, however many of them are in one number."""
        rows, columns = self.parts["weight"].shape
        return rows, columns * FORMATS[self.format].packed


@dataclass(frozen=True)
class Weight:
    """What a full parameter is made of: rows of stored tensors, one after the other, times a scale or one for each row.

    Args:
        pieces: stored tensors with half-open ranges of their rows (the first dim).
        scale: what all pieces are multiplied by: a stored scalar, or a number for each row of the tensor that they are
            all of; None for 1.
        fp8_matmul: whether the file is made for multiplying this in 8 bits, inputs included.
        input_scale: a stored scalar that inputs are divided by before they are made 8 bits; None for 1.
        layer: of a weight in one of `FORMATS`, of which all pieces are rows; it has its scales.
    """

    pieces: tuple[tuple[StoredTensor, int, int], ...]
    scale: StoredTensor | None = None
    fp8_matmul: bool = False
    input_scale: StoredTensor | None = None
    layer: StoredLayer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the full parameter."""
        first, _, _ = self.pieces[0]
        columns = first.shape[1:] if self.layer is None else self.layer.shape[1:]
        return (sum(stop - start for _, start, stop in self.pieces), *columns)


def whole(tensor: StoredTensor) -> Weight:
    """A parameter that is stored as it is."""
    return Weight(((tensor, 0, tensor.shape[0] if tensor.shape else 0),))


def check_unused(keys: Collection[str], file: Path, model: str) -> None:
    """Raise ValueError where a model has no place for tensors, by name and file: without them it would be another.

    Args:
        keys: what was found and is not used.
        file: where; a file or folder.
        model: for the message.
    """
    if keys:
        some = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
        raise ValueError(
            f"{some} in {file}: {model} has no place for {len(keys)} tensor(s) of it; it is another model"
            " or a variant that is not supported"
        )


def check_dtypes(weight: Weight) -> None:
    """Raise ValueError where a weight is stored in a dtype that is not read, by name and file."""
    for tensor, _, _ in weight.pieces if weight.layer is None else ():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{tensor.key} in {tensor.file} is stored as {tensor.dtype}, which is not read; weights in "
                f"{', '.join(WEIGHT_DTYPES)} are"
            )


def find_weight(name: str, shape: Sequence[int], weights: Mapping[str, Weight]) -> Weight:
    """What the tensor that a model calls ``name``, of full ``shape``, is made of.

    Raises:
        ValueError: it is not there, or has another shape or a dtype that is not read, by name and file.
    """
    weight = weights.get(name)
    if weight is None:
        paths = sorted({tensor.file for known in weights.values() for tensor, _, _ in known.pieces})
        files = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "") if paths else "no file"
        raise ValueError(f"the weights have no tensor {name} (looked in {files}); the checkpoint is incomplete")
    check_dtypes(weight)
    tensor, _, _ = weight.pieces[0]
    found = weight.shape if tensor.shape else ()
    if list(found) != list(shape):
        part = "" if found == tensor.shape else f" and gives {name} {list(found)}"
        raise ValueError(
            f"{tensor.key} in {tensor.file} has shape {list(tensor.shape)}{part}, but the model's configuration makes "
            f"it {list(shape)}; the checkpoint and its config.json do not belong together"
        )
    return weight
