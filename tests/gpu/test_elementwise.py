"""Triton's kernels of `elementwise` against its plain form in fp64, in bf16 and fp32, at models' shapes and odd ones.

They run without a GPU too where TRITON_INTERPRET=1 is set, slowly, and are skipped where neither is there.
"""

import os

import pytest
import torch

from parallel_backend.parallel import elementwise, fp8
from parallel_backend.parallel.elementwise import HeadInputs, Pieces, Table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and elementwise.triton_kernels is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA GPU")

# One rounding of the result costs 2^-9 of it at most in bf16, twice that where it is cut off, as interpreted; in fp32
# sums differ in their order.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
# Batch, tokens, width.
SHAPES = [(1, 7, 48), (2, 5, 3072), (1, 0, 48), (1, 3, 6144)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(elementwise, "has_kernels", lambda x: x.dtype != torch.float64)
    with torch.no_grad():
        yield


def draw(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def plain(monkeypatch, function, *args):
    """The same with what the arguments hold in fp64, in plain PyTorch."""

    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, tuple | list):
            parts = [wide(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "has_kernels", lambda x: False)
        return function(*[wide(value) for value in args])


def error(actual, expected):
    assert actual.shape == expected.shape
    return 0.0 if not actual.numel() else ((actual.double() - expected).norm() / expected.norm()).item()


def table(batch, width, dtype, tokens=None):
    """Columns of one wide tensor, as blocks have them; with two rows a sample if tokens choose."""
    rows = draw(batch * (1 if tokens is None else 2), 6 * width, dtype=dtype, seed=3)
    picks = None
    if tokens is not None:
        picks = (torch.arange(batch * tokens, device=DEVICE).view(batch, tokens) % 3 == 0).int()
    return Table(*(rows[:, i * width : (i + 1) * width] for i in range(3)), picks)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chosen", [False, True])
def test_modulated_norm(monkeypatch, shape, dtype, chosen):
    x = draw(*shape, dtype=dtype)
    args = (x, table(shape[0], shape[2], dtype, shape[1] if chosen else None), 1e-6)
    expected = plain(monkeypatch, elementwise.modulated_norm, *args)
    assert error(elementwise.modulated_norm(*args), expected) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dim", "chosen"), [(None, False), (None, True), (1, True), (0, False)])
def test_gated_add_and_norm(monkeypatch, shape, dtype, dim, chosen):
    x, y = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
    pieces = Pieces([y]) if dim is None else Pieces(list(y.clone().tensor_split(2, dim)), dim)
    tables = table(shape[0], shape[2], dtype, shape[1] if chosen else None)
    args = (x.clone(), tables, pieces, tables, 1e-6)
    expected = plain(monkeypatch, elementwise.gated_add_and_norm, *args)
    before = x.clone()
    for got, wanted in zip(elementwise.gated_add_and_norm(*args), expected, strict=True):
        assert error(got, wanted) <= TOLERANCE[dtype]
    assert torch.equal(args[0], before)  # what a block is given stays as it is
    # The piece was used up; the sum alone, from the same numbers.
    args = (x, tables, Pieces([draw(*shape, dtype=dtype, seed=1)]))
    assert error(elementwise.gated_add(*args), expected[0]) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 7, 96), (2, 3, 36864), (1, 0, 96)], ids=str)
def test_swiglu(monkeypatch, shape, dtype):
    x = draw(*shape, dtype=dtype)
    expected = plain(monkeypatch, elementwise.swiglu, x)
    assert error(elementwise.swiglu(x), expected) <= TOLERANCE[dtype]
    in_place = elementwise.swiglu_in_place(x)
    assert in_place.data_ptr() == x.data_ptr()
    assert error(in_place, expected) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize(("batch", "heads", "dim"), [(1, 6, 128), (2, 24, 16), (1, 48, 128)])
def test_turn(monkeypatch, dtype, batch, heads, dim):
    tokens = 11
    wide = draw(batch, tokens, 5 * heads * dim, dtype=dtype)  # queries, keys and values may be columns of more
    fused = wide[..., : 3 * heads * dim]
    angles = draw(tokens, dim // 2, dtype=torch.float32).repeat_interleave(2, dim=1)
    args = (fused, draw(dim, dtype=dtype, seed=7), draw(dim, dtype=dtype, seed=8), 1e-6, angles.cos(), angles.sin())
    expected, beside = plain(monkeypatch, elementwise.turn, *args), wide[..., 3 * heads * dim :].clone()
    value = fused[..., 2 * heads * dim :].clone()
    got = elementwise.turn(*args)
    assert got.data_ptr() == wide.data_ptr()
    assert error(got, expected) <= 1.5 * TOLERANCE[dtype]
    assert torch.equal(got[:, :, 2].flatten(2), value)
    assert torch.equal(wide[..., 3 * heads * dim :], beside)


@DTYPES
@pytest.mark.parametrize(("parts", "apart"), [(1, False), (2, False), (3, False), (1, True)])
@pytest.mark.parametrize(("batch", "heads", "dim"), [(1, 6, 128), (2, 24, 16)])
def test_pack(monkeypatch, dtype, parts, apart, batch, heads, dim):
    streams, lengths = [], (3, 8)
    for seed, tokens in enumerate(lengths):
        fused = draw(batch, tokens, 3 * heads * dim, dtype=dtype, seed=seed)
        weights = (draw(dim, dtype=dtype, seed=7), draw(dim, dtype=dtype, seed=8))
        streams.append(HeadInputs(*fused.chunk(3, dim=-1), *weights, 1e-6))
    angles = draw(sum(lengths), dim // 2, dtype=torch.float32).repeat_interleave(2, dim=1)
    args = (streams, angles.cos(), angles.sin(), parts)

    def run(*args):
        return elementwise.pack(*args, apart=apart)

    for got, expected in zip(run(*args), plain(monkeypatch, run, *args), strict=True):
        assert got.is_contiguous()
        # Queries and keys are normed and turned in fp32 in the plain form.
        assert error(got, expected) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("again", [False, True])
def test_change(monkeypatch, shape, dtype, again):
    batch, tokens, width = shape
    # As a cache has them: the image's part of all tokens, and a tensor of its own.
    after, before = draw(batch, tokens + 2, width, dtype=dtype)[:, 2:], draw(*shape, dtype=dtype, seed=1)
    kept = draw(*shape, dtype=dtype, seed=2) if again else None
    difference, sums = elementwise.change(after, before, kept)
    expected, norms = plain(monkeypatch, elementwise.change, after, before, kept)
    assert error(difference, expected) <= TOLERANCE[dtype]
    assert difference.is_contiguous()
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), norms.double(), rtol=TOLERANCE[dtype], atol=0)
    assert torch.equal(sums, elementwise.change(after, before, kept)[1])


@DTYPES
@pytest.mark.parametrize("chosen", [False, True])
def test_compiled_norm_is_the_kernels(dtype, chosen):
    if INTERPRETED:
        pytest.skip("the compiler wants a GPU")
    x = draw(2, 300, 3072, dtype=dtype)
    args = (x, table(2, 3072, dtype, 300 if chosen else None), 1e-6)
    compiled = torch.compile(elementwise.modulated_norm, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*args), elementwise.modulated_norm(*args))


@DTYPES
def test_merge(monkeypatch, dtype):
    a, b = (draw(2, 5, 6, 16, dtype=dtype, seed=seed) for seed in (0, 1))
    lses = [draw(2, 6, 5, dtype=torch.float32, seed=seed).transpose(1, 2).unsqueeze(-1) for seed in (2, 3)]
    args = (a, lses[0], b, lses[1])
    expected, expected_lse = plain(monkeypatch, lambda *args: elementwise.merge(*args, torch.float64), *args)
    out, lse = elementwise.merge(*args, dtype)
    assert out.dtype == dtype
    assert error(out, expected) <= TOLERANCE[dtype]
    assert error(lse, expected_lse) <= 1e-6


@pytest.fixture
def fp8_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(fp8, "has_fp8_units", lambda device: True)
    elif not fp8.has_fp8_units(torch.device("cuda")):
        pytest.skip("needs a GPU of compute capability 8.9 or higher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("factor", ["none", "one", "rows"])
def test_widened(fp8_kernels, dtype, stored, cut, factor):
    """To the bit as PyTorch's cast and product, for every number of 8 bits, in columns of a wider matrix, too.

    Others than numbers are refused when a file is read.
    """
    every = torch.arange(256, dtype=torch.uint8).view(stored)
    x = every.view(torch.uint8)[every.float().isfinite()].repeat(6, 25).view(stored).to(DEVICE)
    x = x[:, 16:5000] if cut else x
    times = {"none": None, "one": draw(1, dtype=dtype)[0], "rows": draw(6, 1, dtype=dtype)}[factor]
    y = fp8.widened(x, dtype, times)
    wanted = x.to(dtype) if times is None else x.to(dtype) * times
    assert y.is_contiguous()
    if INTERPRETED and dtype == torch.bfloat16:  # which cuts off
        assert error(y, wanted) <= TOLERANCE[dtype]
    else:
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 48), (1, 3, 6144), (1, 0, 48)], ids=str)
def test_quantized_inputs(fp8_kernels, monkeypatch, dtype, shape):
    """To the bit in the same steps; what is no number stays none."""
    x, scale = 300 * draw(*shape, dtype=dtype), torch.tensor(0.7, device=DEVICE)
    if x.numel() and not INTERPRETED:  # where nothing is no number
        x[0, 0, :2] = float("nan")
    for inputs in (x, x[..., : shape[-1] // 2]):
        y = fp8.quantized(inputs, scale, torch.float8_e4m3fn)
        with monkeypatch.context() as patch:
            patch.setattr(elementwise, "has_kernels", lambda _: False)
            wanted = fp8.quantized(inputs, scale, torch.float8_e4m3fn)
        assert y.is_contiguous()
        y, wanted = y.float(), wanted.float()
        if INTERPRETED:  # which cuts off, so that a number in 8 bits is another at times
            assert error(y, wanted) <= 0.05
        else:
            assert torch.equal(y.nan_to_num(7.0), wanted.nan_to_num(7.0))
            assert torch.equal(y.isnan(), wanted.isnan())
    if x.numel():
        assert wanted.abs().nan_to_num(0.0).max() == 448
