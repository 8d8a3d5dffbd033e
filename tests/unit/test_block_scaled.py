"""nvfp4 and mxfp8 as GPUs with units for them multiply: what comfy-kitchen's operators are given, and what comes back.

The CPU has no such product. What stands in for it makes both sides dense, by comfy-kitchen's own code.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel_backend.parallel.block_scaled import works
from parallel_backend.parallel.formats import FORMATS as KNOWN
from parallel_backend.parallel.products import Plain, restored
from parallel_backend.parallel.quantized import Layout, Quantized, has_units
from tests.errors import relative_error
from tests.quantized_file import FORMATS, needs_kitchen, quantize_weight

pytestmark = needs_kitchen
CPU = torch.device("cpu")
ROUNDING = {"nvfp4": 0.15, "mxfp8": 0.04}
"""Of inputs, in 4 and 8 bits."""
EACH = pytest.mark.parametrize("form", ROUNDING)
CODES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}


def products() -> dict[str, object]:
    """Operators that the CPU lacks, by name."""
    import comfy_kitchen

    ops = torch.ops.comfy_kitchen

    def nvfp4(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, blocks_a: Tensor, blocks_b: Tensor,
        bias: Tensor | None, code: int, alpha: Tensor | None,
    ) -> Tensor:  # fmt: skip
        assert alpha is None
        sides = [ops.dequantize_nvfp4(q, s, t, 0, True) for q, s, t in ((a, scale_a, blocks_a), (b, scale_b, blocks_b))]
        return F.linear(*sides, bias if bias is None else bias.float()).to(CODES[code])

    def mxfp8(a: Tensor, b: Tensor, blocks_a: Tensor, blocks_b: Tensor, bias: Tensor | None, code: int) -> Tensor:
        sides = [ops.dequantize_mxfp8(q, t, 0) for q, t in ((a, blocks_a), (b, blocks_b))]
        return F.linear(*sides, bias if bias is None else bias.float()).to(CODES[code])

    assert comfy_kitchen is not None
    return {"scaled_mm_nvfp4": nvfp4, "scaled_mm_mxfp8": mxfp8}


@pytest.fixture
def units(monkeypatch):
    """A CPU with units."""
    for name, product in products().items():
        monkeypatch.setattr(torch.ops.comfy_kitchen, name, product)


def draw(form: str, rows: int = 256, columns: int = 512, native: bool = True, **extra: Tensor):
    """A product, its tensors, and the weight that it stands for."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * columns**-0.5
    parts, dense = quantize_weight(weight, form)
    parts |= extra
    if form == "mxfp8":
        parts["weight_scale"] = parts["weight_scale"].view(torch.uint8)
    name = FORMATS[form][0]
    order = [part for part in KNOWN[name].parts if part in parts]
    return Quantized(Layout(name, KNOWN[name].options, order, native), [parts[part] for part in order]), dense


def inputs(tokens: int, columns: int = 512) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).bfloat16()


@torch.no_grad()
@EACH
@pytest.mark.parametrize("tokens", [1, 37, 64])
def test_inputs_are_quantized_and_nothing_else(units, form, tokens):
    product, dense = draw(form)
    assert product.title == f"{form} (units)"
    assert product.repeated(torch.bfloat16) is product
    x, bias = inputs(tokens), torch.linspace(-1, 1, 256).bfloat16()
    y = product.product(x.view(1, tokens, 512), bias)
    assert (y.shape, y.dtype) == ((1, tokens, 256), torch.bfloat16)
    wanted = F.linear(x.float(), dense, bias.float())
    assert ROUNDING[form] / 10 < relative_error(y[0].float(), wanted) <= ROUNDING[form]
    assert torch.equal(restored(product.kind, product.tensors()).product(x, bias), y[0])
    # A token's numbers are its own, as nvfp4's scale of the tensor is where it is known.
    if form == "mxfp8":
        assert torch.equal(product.product(x[:1], bias), y[0, :1])


@torch.inference_mode()  # in which `linear` comes to them whole
@EACH
def test_as_comfy_kitchens_own_classes_multiply(units, monkeypatch, form):
    """ComfyUI's way: an input in a layout of comfy-kitchen, and `linear` of the two."""
    import comfy_kitchen
    from comfy_kitchen import tensor as kitchen

    stand_in = products()[f"scaled_mm_{form}"]
    code = {dtype: number for number, dtype in CODES.items()}

    def by_name(a, b, *, bias=None, out_dtype=None, **scales):
        order = ("tensor_scale_a", "tensor_scale_b", "block_scale_a", "block_scale_b")
        given = [scales[name] for name in order if name in scales]
        return stand_in(a, b, *given, bias, code[out_dtype], *([None] if form == "nvfp4" else []))

    monkeypatch.setattr(comfy_kitchen, f"scaled_mm_{form}", by_name)
    extra = {"input_scale": torch.tensor(0.002)} if form == "nvfp4" else {}
    name, layout = FORMATS[form][1], getattr(kitchen, FORMATS[form][1])
    weight = (torch.randn(256, 512, generator=torch.Generator().manual_seed(1)) * 512**-0.5).bfloat16()
    x, bias = inputs(37), torch.linspace(-1, 1, 256).bfloat16()
    for given in ({}, extra):
        data, params = layout.quantize(weight.float())
        params = type(params)(**{**vars(params), "orig_dtype": torch.bfloat16})
        held = kitchen.QuantizedTensor(data, name, params)
        scale = {"scale": given["input_scale"]} if given else {}
        theirs = F.linear(kitchen.QuantizedTensor.from_float(x, name, **scale), held, bias)
        parts = {f"weight{end}": part for end, part in layout.state_dict_tensors(data, params).items()} | given
        order = [part for part in KNOWN[FORMATS[form][0]].parts if part in parts]
        ours = Quantized(Layout(FORMATS[form][0], KNOWN[FORMATS[form][0]].options, order, True),
                         [parts[part] for part in order])  # fmt: skip
        assert torch.equal(ours.product(x, bias), theirs)


@torch.no_grad()
@EACH
def test_parts_and_smoothed_inputs(units, form):
    smooth = {"pre_quant_scale": torch.linspace(0.5, 1.5, 512)} if form == "nvfp4" else {}
    given = {"input_scale": torch.tensor(0.002)} if form == "nvfp4" else {}
    product, dense = draw(form, **smooth, **given)
    x = inputs(24)
    whole, wanted = product.product(x), F.linear(x.float(), dense * smooth.get("pre_quant_scale", torch.ones(512)))
    assert relative_error(whole.float(), wanted) <= ROUNDING[form]
    first, last = product.split_rows(128)
    assert torch.equal(torch.cat([first.product(x), last.product(x)], -1), whole)
    late, early = product.split_columns(256)
    assert relative_error((late.product(x[:, :256]) + early.product(x[:, 256:])).float(), whole.float()) <= 0.01
    zeros = product.product(torch.zeros_like(x))
    assert torch.equal(zeros, torch.zeros_like(zeros))


@torch.no_grad()
@EACH
def test_zeros_without_a_scale(units, form):
    product, _ = draw(form)
    assert torch.equal(product.product(torch.zeros(3, 512).bfloat16()), torch.zeros(3, 256).bfloat16())


@torch.no_grad()
@EACH
def test_what_units_do_not_take_is_made_dense(form):
    """Inputs in fp32, and sides that are no multiples: on a CPU without units nothing else would work."""
    product, dense = draw(form)
    x = inputs(5).float()
    assert relative_error(product.product(x), F.linear(x, dense)) <= 1e-6
    odd, dense = draw(form, rows=32, columns={"nvfp4": 80, "mxfp8": 96}[form])
    narrow = inputs(5, odd.shape[1])
    if form == "nvfp4":
        assert odd.title == "nvfp4 (dequantized)"
        assert isinstance(odd.repeated(torch.bfloat16), Plain)
        assert relative_error(odd.product(narrow).float(), F.linear(narrow.float(), dense)) <= 0.01
    else:  # whose files have multiples of 32
        assert odd.title == "mxfp8 (units)"


@EACH
def test_units_are_tried_before_they_are_used(units, monkeypatch, caplog, form):
    assert works.__wrapped__(form, CPU)
    assert not caplog.records
    name = f"scaled_mm_{form}"
    good = products()[name]

    def other_scales(a, b, *others):
        # As if scales of blocks lay row by row.
        *scales, blocks, bias, code = others if form == "mxfp8" else others[:-1]
        turned = blocks.view(torch.uint8).flip(0).view(blocks.dtype)
        return good(a, b, *scales, turned, bias, code, *([None] if form == "nvfp4" else []))

    monkeypatch.setattr(torch.ops.comfy_kitchen, name, other_scales)
    assert not works.__wrapped__(form, CPU)
    assert f"weights in {form} are made dense: a trial product on cpu is" in caplog.text


@EACH
def test_without_units(caplog, form):
    """What comfy-kitchen says on this CPU, which has none."""
    assert not has_units(form, CPU)
    assert not works.__wrapped__(form, CPU)
    assert f"weights in {form} are made dense: cpu cannot multiply them" in caplog.text
