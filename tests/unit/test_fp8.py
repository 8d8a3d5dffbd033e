"""Linears in 8 bits: which are multiplied in 8 bits, and what comes out; torch has the product on the CPU, too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from parallel_backend.loading import targets
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.fp8 import Fp8, can_multiply, has_fp8_units, quantized
from parallel_backend.parallel.products import named_weights
from parallel_backend.parallel.tensor import ColumnParallelLinear, RowParallelLinear, apply_tensor_parallel
from tests.single_file import flux2_tensors, to_fp8, write

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def draw(out=48, width=64, dtype=torch.bfloat16, fp8_dtype=E4M3, scale=0.03, input_scale=0.02):
    """Inputs ``[2, 5, width]``, a weight in 8 bits, a bias, and both scales."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, width, generator=generator).to(dtype)
    x[0, 0, :2] = torch.tensor([100.0, -100.0])  # beyond what 448 * 0.02 holds
    weight = (torch.randn(out, width, generator=generator) * 10).to(fp8_dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    return x, weight, bias, torch.tensor(scale), torch.tensor(input_scale)


def linear(x, weight, bias, scale, input_scale):
    return Fp8(weight, scale, scale.item(), input_scale).product(x, bias)


def reference(x, weight, bias, scale, input_scale):
    """In fp64, of the quantized inputs."""
    limit = torch.finfo(weight.dtype).max
    inputs = (x * (1 / input_scale).to(x.dtype)).clamp(-limit, limit).to(weight.dtype)
    y = F.linear(inputs.double(), weight.double()) * scale.double() * input_scale.double()
    return y if bias is None else y + bias.double()


def products(monkeypatch):
    """How often the 8-bit product was called."""
    calls, product = [], torch._scaled_mm

    def counting(*arguments, **options):
        calls.append(arguments[0].shape)
        return product(*arguments, **options)

    monkeypatch.setattr(torch, "_scaled_mm", counting)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_of_8_bit_inputs(dtype, with_bias, monkeypatch):
    calls = products(monkeypatch)
    x, weight, bias, scale, input_scale = draw(dtype=dtype)
    bias = bias if with_bias else None
    y = linear(x, weight, bias, scale, input_scale)
    assert calls == [(10, 64)]
    assert y.dtype == dtype
    expected = reference(x, weight, bias, scale, input_scale)
    # Products of 8-bit numbers are exact in fp32; the sum is rounded to bf16 once, before or after the bias is added.
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())
    # Which is far less than what the inputs' rounding does: the reference is that of quantized inputs.
    exact = F.linear(x.double(), weight.double()) * scale.double() + (0 if bias is None else bias.double())
    assert (y - exact).norm() > 3 * (y - expected).norm()


def test_inputs_beyond_the_format_are_cut_off():
    x = torch.tensor([[-1000.0, -500.0, 3.0, 448.0, 500.0, 1000.0]])
    assert quantized(x, torch.tensor(1.0), E4M3).tolist() == [[-448, -448, 3, 448, 448, 448]]
    assert quantized(x, torch.tensor(2.0), E4M3).tolist() == [[-448, -256, 1.5, 224, 256, 448]]


def test_any_layout_of_inputs(monkeypatch):
    calls = products(monkeypatch)
    x, weight, bias, scale, input_scale = draw()
    expected = linear(x, weight, bias, scale, input_scale)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    assert torch.equal(linear(turned, weight, bias, scale, input_scale), expected)
    assert torch.equal(linear(x[0, 0], weight, bias, scale, input_scale), expected[0, 0])
    assert linear(x[:0], weight, bias, scale, input_scale).shape == (0, 5, 48)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options",
    [{"out": 40}, {"width": 72}, {"fp8_dtype": E5M2}, {"dtype": torch.float32}],
    ids=["outputs", "inputs", "e5m2", "fp32"],
)
def test_what_the_units_cannot_do_is_multiplied_in_the_inputs_dtype(options, monkeypatch):
    calls = products(monkeypatch)
    x, weight, bias, scale, input_scale = draw(**options)
    y = linear(x, weight, bias, scale, input_scale)
    assert calls == []
    assert not can_multiply(weight, x.dtype)
    expected = (F.linear(x.double(), weight.double()) * scale.double() + bias.double()).to(x.dtype)
    tolerance = torch.finfo(x.dtype).eps * 4
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_a_weight_times_its_scale_is_rounded_as_in_comfyui():
    """comfy_kitchen rounds the scale to the dtype, too; 0.0301 is far from a number of bf16."""
    _, weight, _, _, _ = draw()
    scale = torch.tensor(0.0301)
    expected = weight.bfloat16() * scale.bfloat16()
    assert torch.equal(Fp8(weight, scale).dense(torch.bfloat16), expected)
    assert not torch.equal((weight.float() * scale).bfloat16(), expected)


def test_column_and_row_shards_add_up(monkeypatch):
    x, weight, bias, scale, input_scale = draw(out=64, width=64)
    whole = reference(x, weight, bias, scale, input_scale)
    tolerance = {"rtol": 2**-6, "atol": 2**-6 * whole.abs().max().item()}  # partial sums are rounded, too
    columns, rows = [], []
    monkeypatch.setattr(dist, "all_reduce", lambda y, group: rows.append(y.clone()))
    for rank in (0, 1):
        half = slice(rank * 32, rank * 32 + 32)
        column = ColumnParallelLinear(weight[half].clone(), bias[half], Axis(None, 2, rank), gather_output=False)
        row = RowParallelLinear(weight[:, half].contiguous(), bias, Axis(None, 2, rank))
        for module in (column, row):
            module.hold(Fp8(module.weight, scale, None, input_scale))
        columns.append(column(x))
        row(x[..., half])
    torch.testing.assert_close(torch.cat(columns, -1).double(), whole, **tolerance)
    # The first rank's product has the bias in it.
    torch.testing.assert_close((rows[0] + rows[1]).double(), whole, **tolerance)


class TestLoading:
    """Which layers of a file are multiplied in 8 bits."""

    @pytest.fixture
    def units(self, monkeypatch):
        monkeypatch.setattr(targets, "has_fp8_units", lambda device: True)

    @staticmethod
    def load(path, fp8="matmul", dtype=torch.bfloat16, axis=None):
        source = open_single_file(path)
        model = source.family.transformer.build(source.transformer_config)
        plan = source.family.transformer.plan(source.transformer_config)
        table = apply_tensor_parallel(model, plan, axis) if axis else {}
        load_weights(model, source.weights("transformer"), table, device=torch.device("cpu"), dtype=dtype, fp8=fp8)
        return model

    @staticmethod
    def input_scales(model):
        """Of linears in 8 bits: input scale by name; None where inputs stay as they are."""
        return {
            name.removesuffix(".weight"): None if held.input_scale is None else round(held.input_scale.item(), 6)
            for name, held in named_weights(model).items()
            if isinstance(held, Fp8)
        }

    @pytest.mark.usefixtures("units")
    @pytest.mark.parametrize("layout", ["metadata", "comfy_quant", "scaled_fp8"])
    @pytest.mark.parametrize("axis", [None, Axis(None, 2, 1)], ids=["whole", "shard"])
    def test_layers_that_the_file_is_made_for(self, tmp_path, layout, axis):
        """A fused projection's input scale is that of all its parts; a layer without one has 1."""
        full = ("double_blocks.1.img_mlp.0", "single_blocks.0.linear2")
        scales = {"double_blocks.0.img_attn.qkv": 0.25, "single_blocks.1.linear1": 1.0, "single_blocks.0.linear2": 0.5}
        tensors, metadata = to_fp8(flux2_tensors(), layout, matmul=True, full_precision=full, input_scales=scales)
        model = self.load(write(tmp_path / "model.safetensors", tensors, "model.diffusion_model.", metadata), axis=axis)
        found = self.input_scales(model)
        expected = dict.fromkeys(found, 1.0) | {
            f"transformer_blocks.0.attn.{part}": 0.25 for part in ("to_q", "to_k", "to_v")
        }
        expected["single_transformer_blocks.0.attn.to_out"] = 0.5
        if layout != "scaled_fp8":  # one marker for all layers
            expected |= {"transformer_blocks.1.ff.linear_in": None, "single_transformer_blocks.0.attn.to_out": None}
        assert len(found) == 2 * 12 + 3 * 2
        assert found == expected

    @pytest.mark.usefixtures("units")
    def test_a_marker_of_two_elements_is_for_full_precision(self, tmp_path):
        tensors, _ = to_fp8(flux2_tensors(), "scaled_fp8")
        assert tensors["scaled_fp8"].numel() == 2
        found = self.input_scales(self.load(write(tmp_path / "model.safetensors", tensors)))
        assert set(found.values()) == {None}

    @pytest.mark.usefixtures("units")
    @pytest.mark.parametrize(("fp8", "dtype"), [("stored", torch.bfloat16), ("matmul", torch.float32)])
    def test_where_it_is_not_asked_for_or_not_possible(self, tmp_path, fp8, dtype):
        tensors, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True)
        model = self.load(write(tmp_path / "model.safetensors", tensors, metadata=metadata), fp8, dtype)
        assert set(self.input_scales(model).values()) == {None}

    def test_a_cpu_has_no_units(self, tmp_path):
        assert not has_fp8_units(torch.device("cpu"))
        tensors, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True)
        model = self.load(write(tmp_path / "model.safetensors", tensors, metadata=metadata))
        assert set(self.input_scales(model).values()) == {None}

    @pytest.mark.parametrize(
        ("capability", "cuda", "expected"),
        [((8, 0), "13.0", False), ((8, 9), "13.0", True), ((9, 0), "13.0", True), ((9, 4), None, False)],
    )
    def test_gpus_with_units(self, monkeypatch, capability, cuda, expected):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert has_fp8_units(torch.device("cuda", 0)) == expected

    @pytest.mark.usefixtures("units")
    def test_the_whole_model_in_8_bits_is_near_the_model_in_bf16(self, tmp_path, monkeypatch):
        calls = products(monkeypatch)
        tensors, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True)
        path = write(tmp_path / "model.safetensors", tensors, metadata=metadata)
        generator = torch.Generator().manual_seed(1)
        inputs = {
            "hidden_states": torch.randn(1, 12, 128, generator=generator).bfloat16(),
            "encoder_hidden_states": torch.randn(1, 5, 192, generator=generator).bfloat16(),
            "timestep": torch.tensor([0.5]), "guidance": torch.tensor([4.0]),
            "img_ids": torch.zeros(12, 4), "txt_ids": torch.zeros(5, 4),
        }  # fmt: skip
        with torch.no_grad():
            ours = self.load(path)(**inputs).sample.float()
            assert len(calls) == 2 * 12 + 3 * 2
            exact = self.load(path, "stored")(**inputs).sample.float()
        error = ((ours - exact).norm() / exact.norm()).item()
        # e4m3 keeps 4 bits: inputs are off by up to 2^-4, some 2 % in the mean, in each of 5 blocks.
        assert 1e-4 < error < 0.15
