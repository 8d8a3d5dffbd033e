"""Spoiled input for hypothesis: JSON with a change in it, safetensors files, and a count of all that was tried."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

TRIED: Counter[str] = Counter()
"""Inputs that were tried in this session, by what they are; the summary says so."""

NUMBERS = (
    st.integers()
    | st.sampled_from([0, 1, -1, 7, 1000, 2**24 + 1, 2**31, 2**63 - 1, 2**63, 10**30])
    | st.floats()
    | st.booleans()
)
"""Also those that JSON has no words for: Python's parser takes NaN and Infinity."""
PLAIN = st.none() | NUMBERS | st.text(max_size=20)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """JSON like the one given, but for one place: another value, one too many or one too few."""
    content = json.loads(json.dumps(content))
    place, key = content, None
    while isinstance(place, (dict, list)) and place and (key is None or draw(st.booleans())):
        parent, key = place, draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place = parent[key]
    if key is None:
        return draw(VALUES)
    change = draw(st.sampled_from(["another", "missing", "one more"]))
    if change == "missing":
        del parent[key]
    elif change == "one more" and isinstance(parent, dict):
        parent[draw(st.text(max_size=8))] = draw(VALUES)
    elif change == "one more":
        parent.append(draw(VALUES))
    else:
        parent[key] = draw(NUMBERS | VALUES if isinstance(place, (int, float)) else VALUES)
    return content


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, without its values but where those are looked at when the file is opened."""

    dtype: str
    shape: list[int]
    nbytes: int
    values: bytes | None = None


@dataclass(frozen=True, repr=False)
class File:
    """A safetensors file: what is in its header, and what else it may have."""

    tensors: dict[str, Stored]
    metadata: Any = None

    def __repr__(self) -> str:  # in hypothesis' reports; all of a header would be many pages
        return f"File({len(self.tensors)} tensors)"

    @classmethod
    def read(cls, path: Path) -> File:
        """A proper file."""
        content = path.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:start])
        metadata, tensors = header.pop("__metadata__", None), {}
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = entry["data_offsets"]
            values = content[start + first : start + last] if key.endswith("comfy_quant") else None
            tensors[key] = Stored(entry["dtype"], entry["shape"], last - first, values)
        return cls(tensors, metadata)

    def header(self) -> dict[str, Any]:
        """As JSON: tensors one after the other."""
        header: dict[str, Any] = {} if self.metadata is None else {"__metadata__": self.metadata}
        end = 0
        for key, tensor in self.tensors.items():
            offsets = [end, end + tensor.nbytes]
            header[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            end += tensor.nbytes
        return header

    def write(
        self, path: Path, header: bytes | None = None, length: int | None = None, size: int | None = None
    ) -> None:
        """Write a file, with zeros (that take no disk) for values; ``header``, ``length`` and ``size`` may be wrong."""
        header = json.dumps(self.header()).encode() if header is None else header
        with path.open("wb") as stream:
            stream.write(struct.pack("<Q", len(header) if length is None else length) + header)
            place = stream.tell()
            for tensor in self.tensors.values():
                if tensor.values is not None:
                    stream.seek(place)
                    stream.write(tensor.values)
                place += tensor.nbytes
            stream.truncate(place if size is None else min(size, place))


SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "U8": 1,
    "BOOL": 1,
    "F8_E8M0": 1,
}
LENGTHS = st.sampled_from([0, 1, 2, 3, 64, 127, 128, 256, 2**20, 2**31]) | st.integers(0, 600)
KEYS = st.text(max_size=30) | st.sampled_from(
    ["", "x" * 5000, "__metadata__", "scaled_fp8", "double_blocks.99999999.img_mlp.0.weight", "a\0b",
     "single_blocks.999999999999.linear1.weight", "transformer_blocks.77777777777.attn.to_q.weight",
     "model.layers.123456789.mlp.up_proj.weight", "double_blocks." + "9" * 5000 + ".img_mlp.0.weight",
     "model.visual.blocks.88888888.norm1.weight", "lora_up.weight", "model.layers.1.comfy_quant"]
)  # fmt: skip
MOST_BYTES = 2**42
"""Of a file: file systems have limits of their own."""


@st.composite
def other_files(draw: st.DrawFn, file: File) -> File:
    """Files that are proper safetensors files, and hardly what their keys make one expect."""
    tensors = dict(file.tensors)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[key]
        change = draw(st.sampled_from(["missing", "renamed", "one more", "dtype", "shape", "values", "many"]))
        if change == "missing" and len(tensors) > 1:
            del tensors[key]
        elif change == "renamed":
            tensors[draw(KEYS)] = tensors.pop(key)
        elif change == "one more":
            tensors[draw(KEYS)] = tensor
        elif change == "dtype":
            tensors[key] = _stored(draw(st.sampled_from(sorted(SIZES))), tensor.shape)
        elif change == "shape":
            tensors[key] = _stored(tensor.dtype, draw(st.lists(LENGTHS, max_size=5)))
        elif change == "values":
            values = draw(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
            layer = f"{key.removesuffix('.weight')}.comfy_quant"
            tensors[layer] = Stored("U8", [len(values)], len(values), values)
        else:
            part = draw(st.sampled_from(["double_blocks", "transformer_blocks", "model.layers", "visual.blocks"]))
            tensors |= {f"{part}.{index}.x": _stored("U8", []) for index in range(draw(st.sampled_from([40, 1500])))}
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST_BYTES:
        return file
    return replace(file, tensors=tensors)


def _stored(dtype: str, shape: list[int]) -> Stored:
    nbytes = SIZES[dtype]
    for length in shape:
        nbytes *= length
    return Stored(dtype, shape, nbytes)


@st.composite
def headers(draw: st.DrawFn, file: File) -> bytes:
    """Text in the place of a file's header."""
    header = file.header()
    kind = draw(st.sampled_from(["changed", "offsets", "twice", "deep", "noise", "metadata", "number"]))
    if kind == "changed":
        return json.dumps(draw(changed(header))).encode()
    key = draw(st.sampled_from(sorted(file.tensors)))
    entry = header[key]
    if kind == "offsets":
        first, last = entry["data_offsets"]
        shift = draw(st.integers(-8, 8)) * draw(st.sampled_from([1, 64, 2**60]))
        entry["data_offsets"] = draw(
            st.sampled_from([[first + shift, last + shift], [last, first], [first, last + shift], [0, last], [first]])
        )
    elif kind == "metadata":
        table = draw(st.text(max_size=10) | VALUES.map(json.dumps) | st.just('{"layers": ' + "[" * 5000))
        header["__metadata__"] = draw(st.sampled_from([{"_quantization_metadata": table}, table, [table], 5]))
    text = json.dumps(header).encode()
    if kind == "twice":
        again = json.dumps(entry | {"shape": draw(st.lists(LENGTHS, max_size=2))})
        return text[:-1] + f", {json.dumps(key)}: {again}}}".encode()
    if kind == "deep":
        opening = draw(st.sampled_from([b"[", b'{"a": ']))
        return text[:-1] + b', "deep": ' + opening * draw(st.sampled_from([30, 900, 100_000])) + b"}"
    if kind == "number":
        number = draw(st.sampled_from([b"1e400", b"-0", b"NaN", b"9" * 5000, b"1.0", b"true", b"0x10", b'"3"']))
        return text.replace(str(entry["data_offsets"][1]).encode() + b"]", number + b"]", 1)
    if kind == "noise":
        start = draw(st.integers(0, len(text)))
        noise = draw(st.binary(min_size=1, max_size=12))
        return text[:start] + noise + text[start + len(noise) :]
    return text
