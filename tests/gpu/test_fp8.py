"""Linears in 8 bits on a GPU with fp8 units: products against fp64, what they cannot do, and a model made for them."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import SINGLE
from parallel_backend.parallel.fp8 import Fp8, has_fp8_units
from parallel_backend.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from tests.single_file import flux2_tensors, to_fp8, write
from tests.unit.test_fp8 import E5M2, draw, products, reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not has_fp8_units(torch.device("cuda")),
    reason="needs a CUDA GPU of compute capability 8.9 or higher",
)

# The output is rounded to bf16 (2^-9 at most, 2^-9.8 in the mean) or fp16; fp8 units add up with fewer bits than fp32.
TOLERANCE = 3e-3


def linear(x, weight, bias, scale, input_scale):
    return Fp8(weight, scale, None, input_scale).product(x, bias)


def on_gpu(*tensors):
    return [tensor.cuda() for tensor in tensors]


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "width"), [(48, 64), (6144, 768), (2304, 6144), (6912, 6144)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_of_8_bit_inputs(dtype, out, width, with_bias, monkeypatch):
    calls = products(monkeypatch)
    x, weight, bias, scale, input_scale = on_gpu(*draw(out, width, dtype))
    bias = bias if with_bias else None
    y = linear(x, weight, bias, scale, input_scale)
    assert calls == [(10, width)]
    assert y.dtype == dtype
    expected = reference(x, weight, bias, scale, input_scale)
    assert relative(y, expected) <= TOLERANCE
    exact = F.linear(x.double(), weight.double()) * scale.double() + (0 if bias is None else bias.double())
    assert relative(exact, expected) > 3 * TOLERANCE  # inputs were quantized


@pytest.mark.parametrize("rows", [1, 7, 512, 4608])
def test_any_number_of_rows(rows):
    x, weight, bias, scale, input_scale = on_gpu(*draw(1536, 1024))
    x = torch.randn(1, rows, 1024, device="cuda").bfloat16()
    y = linear(x, weight, bias, scale, input_scale)
    assert y.shape == (1, rows, 1536)
    assert relative(y, reference(x, weight, bias, scale, input_scale)) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"out": 40}, {"width": 72}, {"fp8_dtype": E5M2}, {"dtype": torch.float32}],
    ids=["outputs", "inputs", "e5m2", "fp32"],
)
def test_what_the_units_cannot_do_is_multiplied_in_the_inputs_dtype(options, monkeypatch):
    calls = products(monkeypatch)
    x, weight, bias, scale, input_scale = on_gpu(*draw(**options))
    y = linear(x, weight, bias, scale, input_scale)
    assert calls == []
    assert torch.equal(y, F.linear(x, weight.to(x.dtype) * scale.to(x.dtype), bias))


def test_columns_and_rows(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda y, group: None)  # of one rank
    x, weight, bias, scale, input_scale = on_gpu(*draw(768, 1024))
    expected = reference(x, weight, bias, scale, input_scale)
    for module in (ColumnParallelLinear(weight, bias, SINGLE, False), RowParallelLinear(weight, bias, SINGLE)):
        module.hold(Fp8(module.weight, scale, None, input_scale))
        assert relative(module(x), expected) <= 2 * TOLERANCE  # a row's bias is added after a rounding


def test_the_host_does_not_wait():
    x, weight, bias, scale, input_scale = on_gpu(*draw(768, 1024))
    linear(x, weight, bias, scale, input_scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear(x, weight, bias, scale, input_scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_made_for_it(tmp_path, monkeypatch):
    calls = products(monkeypatch)
    scales = {"single_blocks.1.linear1": 0.05, "double_blocks.0.img_attn.qkv": 0.05}
    full = ("single_blocks.0.linear2",)
    tensors, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True, full_precision=full, input_scales=scales)
    source = open_single_file(write(tmp_path / "model.safetensors", tensors, metadata=metadata))

    def load(fp8):
        model = source.family.transformer.build(source.transformer_config)
        load_weights(
            model, source.weights("transformer"), {}, device=torch.device("cuda"), dtype=torch.bfloat16, fp8=fp8
        )
        return model.cuda()

    inputs = {
        "hidden_states": torch.randn(1, 12, 128).bfloat16(), "encoder_hidden_states": torch.randn(1, 5, 192).bfloat16(),
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([4.0]),
        "img_ids": torch.zeros(12, 4), "txt_ids": torch.zeros(5, 4),
    }  # fmt: skip
    inputs = {name: value.cuda() for name, value in inputs.items()}
    with torch.no_grad():
        ours = load("matmul")(**inputs).sample
        assert len(calls) == 2 * 12 + 3 * 2 - 1
        exact = load("stored")(**inputs).sample
    # e4m3 keeps 4 bits: inputs are off by up to 2^-4, some 2 % in the mean, in each of 5 blocks.
    assert 1e-4 < relative(ours, exact.double()) < 0.15


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scales_of_rows(compiled, monkeypatch):
    """They stay in 8 bits and are multiplied in the inputs' dtype; no fp8 product takes them."""
    calls = products(monkeypatch)
    x, weight, bias, _, _ = on_gpu(*draw(768, 1024))
    scale = torch.rand(len(weight), 1, device="cuda") / 100 + 0.001
    run = torch.compile(linear, fullgraph=True) if compiled else linear
    with torch.no_grad():
        y = run(x, weight, bias, scale, None)
    assert calls == []
    assert relative(y, F.linear(x.double(), weight.double() * scale.double(), bias.double())) <= 1e-2  # of bf16
