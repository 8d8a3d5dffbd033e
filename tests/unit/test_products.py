"""What linears multiply with: parts of it, in eager and in compiled code, whatever it is stored as."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.families import family_of_name
from parallel_backend.mesh import build_mesh
from parallel_backend.parallel import long_mlp
from parallel_backend.parallel.fp8 import Fp8
from parallel_backend.parallel.long_mlp import Mlp, mlp_in_pieces, mlp_in_place
from parallel_backend.parallel.products import Adapted, Foreign, Plain, Product, product_of, restored
from parallel_backend.parallel.tensor import WholeLinear
from parallel_backend.parallelize import parallelize_transformer
from tests.distributed.cases import flux2_inputs, tiny_transformer

E4M3 = torch.float8_e4m3fn


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    """Sums of 64 numbers in another order, in fp32."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def plain(out, width):
    return Plain(draw(out, width))


def fp8(out, width):
    return Fp8((draw(out, width) * 10).to(E4M3), torch.tensor(0.03), 0.03)


def fp8_rows(out, width):
    return Fp8((draw(out, width) * 10).to(E4M3), draw(out, 1, seed=1).abs())


def fp8_units(out, width):
    return Fp8((draw(out, width) * 10).to(E4M3), torch.tensor(0.03), 0.03, torch.tensor(0.5))


def adapted(out, width):
    return beside(fp8(out, width))


def adapted_plain(out, width):
    return beside(plain(out, width))


def beside(base):
    out, width = base.shape
    return Adapted(base, draw(4, width, seed=2), draw(out, 4, seed=3), draw(4, seed=7))


MAKERS = {
    "plain": plain,
    "fp8": fp8,
    "fp8 rows": fp8_rows,
    "fp8 units": fp8_units,
    "adapted": adapted,
    "adapted plain": adapted_plain,
}


@pytest.fixture(params=MAKERS)
def product(request) -> Product:
    return MAKERS[request.param](48, 64)


@torch.no_grad()
def test_parts_are_parts_of_the_whole(product):
    x, bias, weight = draw(2, 5, 64, seed=4), draw(48, seed=5), product.dense(torch.float32)
    assert product.shape == tuple(weight.shape) == (48, 64)
    expected = F.linear(x, weight, bias)
    close(product.product(x, bias), expected)
    first, last = product.split_rows(16)
    assert (first.shape, last.shape) == ((16, 64), (32, 64))
    close(torch.cat([first.product(x, bias[:16]), last.product(x, bias[16:])], -1), expected)
    late, early = product.split_columns(32)
    y = early.product(x[..., 32:], bias)
    close(late.added(y, x[..., :32]), expected)
    summed = late.add_to(y, x[..., :32])
    assert summed.data_ptr() == y.data_ptr(), "what is used up is written to"
    close(summed, expected)
    into = torch.empty(10, 48)
    product.product_in(into, x.view(10, 64), bias)
    close(into, expected.view(10, 48))
    close(product.repeated(x.dtype).product(x, bias), expected)
    again = restored(product.kind, product.tensors())
    close(again.product(x, bias), expected)


def test_with_gradients_nothing_is_written_to(product):
    x = draw(2, 5, 64, seed=4).requires_grad_()
    y = draw(2, 5, 48, seed=6)
    before = y.clone()
    product.add_to(y, x).sum().backward()
    assert torch.equal(y, before)
    close(x.grad[0, 0], product.dense(torch.float32).sum(0))


@torch.no_grad()
def test_compiled(product):
    """As one graph, whose numbers are those of eager code."""

    def block(linear, x):
        first, last = product_of(linear).split_rows(16)
        late, early = product_of(linear).split_columns(32)
        y = early.product(x[..., 32:], linear.bias)
        return first.product(x), last.product(x), late.add_to(y, x[..., :32])

    linear, x = WholeLinear(product, draw(48, seed=5)), draw(2, 5, 64, seed=4)
    expected = block(linear, x)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, two in zip(compiled(linear, x), expected, strict=True):
        close(one, two)
    # Another layer is the same graph: scales are no part of it.
    other = WholeLinear(type(product)(*vars(product).values()), linear.bias)
    for value in vars(other.product):
        if value == "alpha" and other.product.alpha is not None:
            other.product.alpha, other.product.scale = 0.5, torch.tensor(0.5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for one, two in zip(compiled(other, x), block(other, x), strict=True):
            close(one, two)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_an_mlp_in_pieces(product, compiled, monkeypatch):
    monkeypatch.setattr(long_mlp, "PIECE", 4)
    out = Fp8((draw(64, 24) * 10).to(E4M3), torch.tensor(0.03), 0.03)
    x, bias = draw(2, 5, 64, seed=4), draw(64, seed=5)
    gate, up = product.product(x).chunk(2, -1)
    expected = F.linear(F.silu(gate) * up, out.dense(torch.float32), bias)

    def run(x):
        mlp = Mlp(product, None, out, bias).repeated(x.dtype)
        y = mlp_in_pieces(x, mlp)
        mlp_in_place(x, 3, 7, 2, mlp)
        return y

    before = x.clone()
    y = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")(x) if compiled else run(x)
    close(y, expected)
    x, before, expected = (tensor.view(10, 64) for tensor in (x, before, expected))
    close(x[3:7], expected[3:7])
    assert torch.equal(x[:3], before[:3])
    assert torch.equal(x[7:], before[7:])


class Wrapped(nn.Module):
    """A linear of another library, as peft puts it in the place of torch's."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.calls = linear, 0
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        self.calls += 1
        return self.base_layer(x)


@torch.no_grad()
@pytest.mark.parametrize("piece", [4, 10_000])
def test_linears_of_other_libraries(piece, monkeypatch):
    """In a model whose blocks ask for parts: each is called once, and the output is as it was."""
    monkeypatch.setattr(long_mlp, "PIECE", piece)
    model, inputs = tiny_transformer(), flux2_inputs(8, [(8, 8)], 1)
    wrapped = copy.deepcopy(model)
    found = []
    for block in (*wrapped.transformer_blocks, *wrapped.single_transformer_blocks):
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                parent, _, leaf = name.rpartition(".")
                found.append(Wrapped(module))
                setattr(block.get_submodule(parent), leaf, found[-1])
                assert isinstance(product_of(found[-1]), Foreign)
    layout = ParallelismConfig()
    outputs = []
    for one in (model, wrapped):
        parallelize_transformer(one, family_of_name("flux2").transformer, layout, build_mesh(layout), AS_IT_IS)
        outputs.append(one(**inputs, return_dict=False)[0])
    close(outputs[1], outputs[0])
    assert {module.calls for module in found} == {1}
