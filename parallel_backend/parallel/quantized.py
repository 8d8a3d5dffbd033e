"""Products with weights in comfy-kitchen's formats: multiplied as they are where a device can, or made dense each time.

To `torch.compile` both are one operator of ours: half of comfy-kitchen's functions are none.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_scaled import DTYPES, PADDED, fits, multiply, works
from .formats import FORMATS, TILE_ROWS, Options
from .kitchen import CODES, has_kernels, kitchen
from .products import KINDS, Plain, Product

_library = torch.library.Library("hybrid_dit", "FRAGMENT")


def has_units(format: str, device: torch.device) -> bool:
    """Whether weights in a format are multiplied as they are on a device, rather than made dense."""
    needed = FORMATS[format].capability
    if needed is None or not has_kernels(device):
        return False
    if device.type == "cpu":
        return format not in PADDED
    return torch.cuda.get_device_capability(device) >= needed and (format not in PADDED or works(format, device))


class Layout:
    """What there is to know of a quantized weight beside its tensors.

    Args:
        format: one of `FORMATS`.
        options: what the file says of it, complete.
        parts: names of the tensors that there are.
        native: whether it is multiplied as it is.
    """

    def __init__(self, format: str, options: Options, parts: Sequence[str], native: bool) -> None:
        about = FORMATS[format]
        self.text = json.dumps([format, dict(options), list(parts), native])
        self.format, self.options, self.names, self.native = format, dict(options), tuple(parts), native
        self.packed = about.packed
        self.grid = about.grid(options)
        rules = [about.parts[name] for name in parts]
        self.rules = tuple((rule.rows, rule.columns_of(options), rule.run, rule.turned) for rule in rules)

    def multiplies(self, weight: Tensor) -> bool:
        """Whether a weight is multiplied as it is stored: where there are units, and they take its shape."""
        rows, columns = weight.shape
        return self.native and (self.format not in PADDED or fits((rows, columns * self.packed)))


@functools.cache
def _layout(text: str) -> Layout:
    return Layout(*json.loads(text))


class Quantized(Product):
    """A weight in a format of `FORMATS`.

    Args:
        layout: of it.
        parts: its tensors in the order of `Layout.names`, those of this weight's rows and columns.
    """

    def __init__(self, layout: Layout, parts: Sequence[Tensor]) -> None:
        self.layout, self.parts = layout, tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.parts[0].shape
        return rows, columns * self.layout.packed

    @property
    def kind(self) -> str:
        return f"quantized {self.layout.text}"

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def title(self) -> str:
        how = "units" if self.layout.multiplies(self.parts[0]) else "dequantized"
        return f"{FORMATS[self.layout.format].title} ({how})"

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.hybrid_dit.quantized_product(x, self.layout.text, list(self.parts), bias)
        return _product(x, self.layout, self.parts, bias)

    def rows(self, first: int, end: int) -> Product:
        if first % self.layout.grid[0] or (end % self.layout.grid[0] and end != self.shape[0]):
            return _Cut(self, (first, end), (0, self.shape[1]))
        parts = []
        for part, (rows, _, _, turned) in zip(self.parts, self.layout.rules, strict=True):
            if rows and part.ndim:
                last = -(-end // rows) * rows
                part = part[:, first:last] if turned else part[first:last]
            parts.append(part)
        return Quantized(self.layout, parts)

    def columns(self, first: int, end: int) -> Product:
        if first % self.layout.grid[1] or (end % self.layout.grid[1] and end != self.shape[1]):
            return _Cut(self, (0, self.shape[0]), (first, end))
        parts = []
        for part, (_, columns, run, turned) in zip(self.parts, self.layout.rules, strict=True):
            if columns:
                a, b = first // columns, -(-end // columns)
                if run > 1:
                    tiles = part.view(part.shape[0] // TILE_ROWS, -1, run)[:, a:b]
                    part = tiles.reshape(part.shape[0], -1)
                else:
                    part = part[a:b] if turned or part.ndim == 1 else part[:, a:b].contiguous()
            parts.append(part)
        return Quantized(self.layout, parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.hybrid_dit.quantized_dense(self.layout.text, list(self.parts), dtype)
        return _dense(self.layout, self.parts, dtype)

    def repeated(self, dtype: torch.dtype) -> Product:
        return self if self.layout.multiplies(self.parts[0]) else Plain(self.dense(dtype))

    def tensors(self) -> Sequence[Tensor]:
        return self.parts


class _Cut(Product):
    """Rows and columns off the grid of a format: taken from the whole, once that is dense."""

    def __init__(self, base: Product, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        self.base, self.of_rows, self.of_columns = base, rows, columns

    @property
    def shape(self) -> tuple[int, int]:
        return self.of_rows[1] - self.of_rows[0], self.of_columns[1] - self.of_columns[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.dense(x.dtype), bias)

    def rows(self, first: int, end: int) -> Product:
        return _Cut(self.base, (self.of_rows[0] + first, self.of_rows[0] + end), self.of_columns)

    def columns(self, first: int, end: int) -> Product:
        return _Cut(self.base, self.of_rows, (self.of_columns[0] + first, self.of_columns[0] + end))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.base.dense(dtype)[slice(*self.of_rows), slice(*self.of_columns)]

    def tensors(self) -> Sequence[Tensor]:
        return self.base.tensors()


class SideBySide(Product):
    """A weight in blocks of columns, each a product of its own: what is multiplied apart is stored apart."""

    def __init__(self, blocks: Sequence[Product]) -> None:
        self.blocks = tuple(blocks)

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks[0].shape[0], sum(block.shape[1] for block in self.blocks)

    @property
    def kind(self) -> str | None:
        kinds = {block.kind for block in self.blocks}
        return None if len(kinds) > 1 or None in kinds else f"beside {len(self.blocks)} {kinds.pop()}"

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype

    @property
    def title(self) -> str:
        return self.blocks[0].title

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        first = self.blocks[0].shape[1]
        y, at = self.blocks[0].product(x[..., :first], bias), first
        for block in self.blocks[1:]:
            y = block.added(y, x[..., at : at + block.shape[1]])
            at += block.shape[1]
        return y

    def rows(self, first: int, end: int) -> Product:
        return SideBySide([block.rows(first, end) for block in self.blocks])

    def columns(self, first: int, end: int) -> Product:
        found, at = [], 0
        for block in self.blocks:
            a, b = max(first, at) - at, min(end, at + block.shape[1]) - at
            if a < b:
                found.append(block if (a, b) == (0, block.shape[1]) else block.columns(a, b))
            at += block.shape[1]
        return found[0] if len(found) == 1 else SideBySide(found)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([block.dense(dtype) for block in self.blocks], dim=1)

    def repeated(self, dtype: torch.dtype) -> Product:
        return SideBySide([block.repeated(dtype) for block in self.blocks])

    def tensors(self) -> Sequence[Tensor]:
        return [tensor for block in self.blocks for tensor in block.tensors()]


def _restored_blocks(options: str, tensors: Sequence[Tensor]) -> SideBySide:
    count, _, kind = options.partition(" ")
    name, _, others = kind.partition(" ")
    each = len(tensors) // int(count)
    return SideBySide([KINDS[name](others, tensors[i : i + each]) for i in range(0, len(tensors), each)])


KINDS["quantized"] = lambda text, tensors: Quantized(_layout(text), tensors)
KINDS["beside"] = _restored_blocks


def _product(x: Tensor, layout: Layout, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    kitchen()
    named: dict[str, Any] = dict(zip(layout.names, parts, strict=True))
    if "pre_quant_scale" in named:
        x = x * named["pre_quant_scale"].to(x.dtype)
    weight, options = parts[0], layout.options
    in_blocks = layout.format in PADDED
    if not x.numel() or not layout.multiplies(weight) or (in_blocks and x.dtype not in DTYPES):
        return F.linear(x, _dense(layout, parts, x.dtype, smoothed=False), bias)
    x = x.contiguous()
    if layout.format == "int8_tensorwise":
        return torch.ops.comfy_kitchen.int8_linear(
            x, weight, named["weight_scale"], bias, CODES[x.dtype], options["convrot"], options["convrot_groupsize"]
        )
    flat = x.view(-1, x.shape[-1])
    if in_blocks:
        return multiply(layout.format, flat, named, bias).view(*x.shape[:-1], -1)
    if layout.format == "asym_w4a8_int8":
        y = kitchen().w4a8_int8_linear(
            flat, weight, named["weight_s_rel"], named["weight_s_channel"], named.get("weight_codebook"), None, bias,
            options["group_size"], options["convrot_groupsize"], x.dtype,
        )  # fmt: skip
    else:
        assert layout.format == "convrot_w4a4", layout.format
        y = kitchen().convrot_w4a4_linear(
            flat,
            weight,
            named["weight_scale"],
            bias,
            options["convrot_groupsize"],
            linear_dtype=options["linear_dtype"],
        )
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def _dense(layout: Layout, parts: Sequence[Tensor], dtype: torch.dtype, smoothed: bool = True) -> Tensor:
    """The weight; ``smoothed`` where inputs are not multiplied by their ``pre_quant_scale``."""
    named = dict(zip(layout.names, parts, strict=True))
    weight, options = parts[0], layout.options
    if dtype not in CODES:
        return _dense(layout, parts, torch.float32, smoothed).to(dtype)
    kitchen()
    ops, code = torch.ops.comfy_kitchen, CODES[dtype]
    if layout.format == "int8_tensorwise":
        if options["convrot"]:
            group = options["convrot_groupsize"]
            return ops.dequantize_int8_convrot_weight_dtype(weight, named["weight_scale"], group, code)
        return ops.dequantize_int8_simple_dtype(weight, named["weight_scale"], code)
    if layout.format == "nvfp4":
        dense = ops.dequantize_nvfp4(weight, named["weight_scale_2"], named["weight_scale"], code, True)
    elif layout.format == "mxfp8":
        dense = ops.dequantize_mxfp8(weight, named["weight_scale"].view(torch.float8_e8m0fnu), code)
    elif layout.format == "asym_w4a8_int8":
        dense = kitchen().dequantize_w4a8_int8_weight(
            weight, named["weight_s_rel"], named["weight_s_channel"], named.get("weight_codebook"), None,
            options["group_size"], options["convrot_groupsize"], dtype,
        )  # fmt: skip
    elif layout.format == "convrot_w4a4":
        dense = kitchen().dequantize_convrot_w4a4_weight(
            weight, named["weight_scale"], options["convrot_groupsize"], output_dtype=dtype
        )
    else:
        dense = _dense_awq(weight, named["weight_scale"], named["weight_zeros"], options["group_size"], dtype)
    if smoothed and "pre_quant_scale" in named:
        dense = dense * named["pre_quant_scale"].to(dtype)
    return dense.to(dtype)


def _dense_awq(weight: Tensor, scale: Tensor, zeros: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Unsigned numbers of 4 bits, the even column in the low one: ``(q - 8) * scale + zero`` of their group."""
    packed = weight.view(torch.uint8)
    numbers = torch.stack([packed & 15, packed >> 4], dim=-1).view(weight.shape[0], -1, group).to(dtype)
    dense = (numbers - 8) * scale.t().unsqueeze(-1).to(dtype) + zeros.t().unsqueeze(-1).to(dtype)
    return dense.view(weight.shape[0], -1)


def _op_product(x: Tensor, text: str, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    return _product(x, _layout(text), parts, bias)


def _op_dense(text: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _dense(_layout(text), parts, dtype).clone()


def _fake_dense(text: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    rows, columns = parts[0].shape
    return parts[0].new_empty(rows, columns * _layout(text).packed, dtype=dtype)


_library.define("quantized_product(Tensor x, str text, Tensor[] parts, Tensor? bias) -> Tensor")
_library.define("quantized_dense(str text, Tensor[] parts, ScalarType dtype) -> Tensor")
for _device in ("CPU", "CUDA"):
    _library.impl("quantized_product", _op_product, _device)
    _library.impl("quantized_dense", _op_dense, _device)
torch.library.register_fake(
    "hybrid_dit::quantized_product",
    lambda x, text, parts, bias: x.new_empty(*x.shape[:-1], parts[0].shape[0]),
    lib=_library,
)
torch.library.register_fake("hybrid_dit::quantized_dense", _fake_dense, lib=_library)
