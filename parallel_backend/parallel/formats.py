"""The number formats of quantized weights as data: what tensors a weight has, and how each follows a cut of it.

Formats and the names of their tensors are ComfyUI's (comfy-kitchen). A weight is ``[out, in]``, rows and columns. The
tensors beside it follow its cuts: block scales of nvfp4 and mxfp8 lie in tiles of 128 rows and 4 blocks, as cuBLAS
takes them (docs.nvidia.com/cuda/cublas, 1D Block Scaling Factors Layout), so a cut along tiles is a cut of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TILE_ROWS, TILE_BLOCKS, TILE_BYTES = 128, 4, 512
"""Of a tile of block scales."""
GROUP = 256
"""Columns that are rotated together, unless a file says otherwise."""
ROTATIONS = tuple(4**power for power in range(1, 8))
"""How many columns can be rotated together: by a regular Hadamard matrix."""
MOST_GROUP = 2**16
Options = Mapping[str, Any]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight.

    Args:
        dtypes: that it may be stored as, by safetensors' names. Where a file has bytes (``U8``) they are of the first.
        shapes: of ``(rows, columns, options)`` of the weight -> those that it may have.
        rows: rows of the weight for each of its own; 0 where all rows share it.
        columns: columns of the weight for each of its own, or a function of the options; 0 where all share it.
        run: elements for each of its own columns.
        turned: whether it is stored as ``[columns, rows]``.
        optional: whether a file may lack it.
        beside_rows: whether numbers that are one for each row are held as a column.
    """

    dtypes: tuple[str, ...]
    shapes: Callable[[int, int, Options], Shapes]
    rows: int = 1
    columns: int | Callable[[Options], int] = 0
    run: int = 1
    turned: bool = False
    optional: bool = False
    beside_rows: bool = False

    def columns_of(self, options: Options) -> int:
        """Columns of the weight for each of its own; 0 where all share it."""
        return self.columns(options) if callable(self.columns) else self.columns


@dataclass(frozen=True)
class Format:
    """A number format.

    Args:
        title: for messages.
        parts: last part of a tensor's key -> what it is; ``weight`` is the first.
        packed: columns in one element of ``weight``.
        unit: columns that its products take at a time.
        options: that a file may state -> what they are where it does not.
        capability: of NVIDIA's GPUs from which on there are units for it here; None where it is always dequantized.
    """

    title: str
    parts: Mapping[str, Part]
    packed: int = 1
    unit: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    capability: tuple[int, int] | None = None

    def rotation(self, options: Options) -> int:
        """Columns that are rotated together; 0 where none are."""
        rotated = "convrot_groupsize" in self.options and options.get("convrot", True)
        return int(options["convrot_groupsize"]) if rotated else 0

    def grid(self, options: Options) -> tuple[int, int]:
        """Rows and columns between which the weight can be cut."""
        columns = [part.columns_of(options) for part in self.parts.values()]
        rows = math.lcm(*(part.rows or 1 for part in self.parts.values()))
        return rows, math.lcm(self.rotation(options) or 1, self.packed, self.unit, *(count or 1 for count in columns))


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _scalar(rows: int, columns: int, options: Options) -> Shapes:
    return ((), (1,))


def _each_row(rows: int, columns: int, options: Options) -> Shapes:
    return ((rows,), (rows, 1))


def _groups(rows: int, columns: int, options: Options) -> Shapes:
    return ((rows, columns // options["group_size"]),)


def _groups_turned(rows: int, columns: int, options: Options) -> Shapes:
    return ((columns // options["group_size"], rows),)


def _tiles(block: int) -> Callable[[int, int, Options], Shapes]:
    """Of block scales, of which each is of so many columns."""
    return lambda rows, columns, options: ((_up(rows, TILE_ROWS), _up(-(-columns // block), TILE_BLOCKS)),)


def _weight(dtypes: tuple[str, ...], packed: int = 1) -> Part:
    return Part(dtypes, lambda rows, columns, _: ((rows, columns // packed),), columns=packed)


def _group_size(options: Options) -> int:
    return int(options["group_size"])


_FLOATS = ("F32", "BF16", "F16")
FORMATS: dict[str, Format] = {
    "int8_tensorwise": Format(
        "int8",
        {
            "weight": _weight(("I8",)),
            "weight_scale": Part(_FLOATS, lambda *of: (*_scalar(*of), *_each_row(*of)), beside_rows=True),
        },
        unit=16,
        options={"convrot": False, "convrot_groupsize": GROUP},
        capability=(7, 5),
    ),
    "nvfp4": Format(
        "nvfp4",
        {
            "weight": _weight(("U8",), packed=2),
            "weight_scale": Part(("F8_E4M3", "U8"), _tiles(16), TILE_ROWS, 16 * TILE_BLOCKS, TILE_BYTES),
            "weight_scale_2": Part(_FLOATS, _scalar, rows=0),
            "input_scale": Part(_FLOATS, _scalar, rows=0, optional=True),
            "pre_quant_scale": Part(_FLOATS, lambda rows, columns, _: ((columns,),), rows=0, columns=1, optional=True),
        },
        packed=2,
        capability=(10, 0),
    ),
    "mxfp8": Format(
        "mxfp8",
        {
            "weight": _weight(("F8_E4M3",)),
            "weight_scale": Part(("F8_E8M0", "U8"), _tiles(32), TILE_ROWS, 32 * TILE_BLOCKS, TILE_BYTES),
        },
        capability=(10, 0),
    ),
    "asym_w4a8_int8": Format(
        "w4a8",
        {
            "weight": _weight(("I8",), packed=2),
            "weight_s_rel": Part(("F8_E4M3", "U8", "F32"), _groups, columns=_group_size),
            "weight_s_channel": Part(("F32",), lambda rows, *_: ((rows,),)),
            "weight_codebook": Part(("F32",), lambda *_: ((16,),), rows=0, optional=True),
        },
        packed=2,
        options={"group_size": 16, "convrot_groupsize": GROUP},
        capability=(8, 0),
    ),
    "convrot_w4a4": Format(
        "w4a4",
        {"weight": _weight(("I8",), packed=2), "weight_scale": Part(_FLOATS, lambda rows, *_: ((rows,),))},
        packed=2,
        options={"convrot_groupsize": GROUP, "linear_dtype": "int4"},
        capability=(8, 0),
    ),
    "awq_w4a16": Format(
        "awq w4a16",
        {
            "weight": _weight(("I8",), packed=2),
            "weight_scale": Part(_FLOATS[1:], _groups_turned, columns=_group_size, turned=True),
            "weight_zeros": Part(_FLOATS[1:], _groups_turned, columns=_group_size, turned=True),
        },
        packed=2,
        options={"group_size": 64},
    ),
}
"""By ComfyUI's names. fp8 with scales a tensor or a row has code of its own (`fp8`), which needs no other library."""


def options_problem(options: Options) -> str:
    """What is wrong with what a file says of a weight; nothing if all is as it should be."""
    for name, value in options.items():
        if name.endswith(("group_size", "groupsize")):
            if type(value) is not int or not 0 < value <= MOST_GROUP:
                return f"its {name} is {str(value)[:100]}, where a number up to {MOST_GROUP} is expected"
            if name == "convrot_groupsize" and options.get("convrot", True) and value not in ROTATIONS:
                return f"its {name} is {value}, where a power of 4 is expected"
        elif name == "linear_dtype" and value not in ("int4", "int8"):
            return f"its {name} is {str(value)[:100]}, where int4 or int8 is expected"
        elif name == "convrot" and not isinstance(value, bool):
            return f"its {name} is {str(value)[:100]}, where true or false is expected"
    return ""
