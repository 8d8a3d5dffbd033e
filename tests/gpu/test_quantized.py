"""Weights in every number format of ComfyUI on a GPU: products against the dense weight, compiled, in a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F

from parallel_backend.parallel.quantized import Layout, Quantized, has_units
from tests.errors import relative_error
from tests.quantized_file import FORMATS, needs_kitchen
from tests.unit.test_quantized import draw

pytestmark = [
    needs_kitchen,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OUTPUT = 5e-3
"""Products in bf16 are rounded to 2^-9 at most, and the dense weight before them."""
ROUNDING = {"int8": 0.02, "int8_rows": 0.02, "int8_convrot": 0.02, "w4a8": 0.02, "w4a4": 0.3, "nvfp4": 0.15,
            "mxfp8": 0.04}  # fmt: skip
"""Of inputs, where units multiply; w4a4 multiplies numbers of 8 bits on some GPUs, and is nearer there."""


def on_gpu(form, native=True):
    """A product, what it stands for, and how far off its products may be."""
    product, dense = draw(form)
    layout, device = product.layout, torch.device("cuda")
    native = native and has_units(layout.format, device)
    made = Quantized(
        Layout(layout.format, layout.options, layout.names, native), [tensor.cuda() for tensor in product.tensors()]
    )
    assert made.title.endswith("(units)" if native else "(dequantized)")
    return made, dense.cuda(), OUTPUT + (ROUNDING[form] if native else 0.0)


def inputs(tokens, seed=0):
    return torch.randn(1, tokens, 1024, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tokens", [1, 37, 512])
def test_products(form, native, tokens):
    product, dense, most = on_gpu(form, native)
    x, bias = inputs(tokens), torch.linspace(-1, 1, 512, device="cuda").bfloat16()
    wanted = F.linear(x.float(), dense, bias.float())
    assert relative_error(product.product(x, bias).float(), wanted) <= most
    first, last = product.split_rows(128)
    assert relative_error(torch.cat([first.product(x), last.product(x)], -1).float(), wanted - bias.float()) <= most
    late, early = product.split_columns(512)
    assert relative_error(late.added(early.product(x[..., 512:], bias), x[..., :512]).float(), wanted) <= 2 * most


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMATS)
def test_compiled(form):
    product, dense, most = on_gpu(form)
    compiled = torch.compile(lambda x: F.silu(product.product(x)), fullgraph=True)
    x = inputs(37)
    assert relative_error(compiled(x).float(), F.silu(F.linear(x.float(), dense))) <= 2 * most


@torch.inference_mode()
@pytest.mark.parametrize("form", FORMATS)
def test_in_a_cuda_graph(form):
    product, dense, most = on_gpu(form)
    x, stream = inputs(64), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # workspaces are made
            product.product(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product.product(x)
    x.copy_(inputs(64, seed=1))
    graph.replay()
    assert relative_error(y.float(), F.linear(x.float(), dense)) <= most
