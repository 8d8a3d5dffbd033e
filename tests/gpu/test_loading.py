"""Weights through page-locked buffers to the GPU: the right bytes, little memory beside them, and one host sync."""

import re
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from parallel_backend.loading import staging, targets
from parallel_backend.loading.safetensors_reader import read_header, whole
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.staging import BUFFER_BYTES, BUFFERS
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.tensor import Shard, apply_tensor_parallel
from tests.single_file import to_fp8, write
from tests.unit.test_loading_memory import random_file
from tests.unit.test_weight_loader import load, poison, random_model, stored

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda")
SIZE = {"heads": 12, "double": 2, "single": 44}
"""3 GiB in bf16."""


@pytest.mark.parametrize("buffer_bytes", [BUFFER_BYTES, 1024])
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("degree", [1, 4])
def test_every_parameter_is_safetensors_own(tmp_path, monkeypatch, buffer_bytes, stored_as, dtype, degree):
    for module in (staging, targets):
        monkeypatch.setattr(module, "BUFFER_BYTES", buffer_bytes)
    weights = stored(random_model(), tmp_path, lambda _, tensor: tensor.to(stored_as))
    for rank in range(degree):
        model, table = load(weights, degree, rank, dtype, GPU)
        for name, parameter in model.named_parameters():
            with safe_open(weights[name].pieces[0][0].file, "pt") as own:
                full = own.get_tensor(name).to(dtype)
            assert parameter.is_cuda
            assert torch.equal(parameter.cpu(), table[name].take(full) if name in table else full), (rank, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("degree", [1, 8])
def test_buffers_are_used_again_only_when_they_were_copied(tmp_path, style, degree, dtype):
    """Each number says where it stands, so that bytes of another piece, older or newer, are found. 1.5 GiB."""

    def numbers(rows, columns):
        return torch.arange(rows.start, rows.stop)[:, None] * 8192 + torch.arange(columns.start, columns.stop)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8192, 16384, bias=False) for _ in range(3))

    # A prime, so that no two pieces look the same; exact in fp32.
    tensor = (numbers(range(16384), range(8192)) % 16777213).float()
    save_file({f"layers.{index}.weight": tensor + index for index in range(3)}, tmp_path / "model.safetensors")
    weights = {name: whole(found) for name, found in read_header(tmp_path / "model.safetensors").items()}
    with torch.device("meta"):
        model = Model()
    rank = degree - 1
    table = apply_tensor_parallel(model, {"layers.*": Shard(style)}, Axis(None, degree, rank))
    load_weights(model, weights, table, device=GPU, dtype=dtype)
    expected = tensor.cuda()
    for index, layer in enumerate(model.layers):
        part = (expected + index).chunk(degree, 0 if style == "column" else 1)[rank]
        assert torch.equal(layer.weight, part.to(dtype)), index


def load_on_gpu(path, fp8="cast", dtype=torch.bfloat16):
    """A model, bytes held, and the peak of GPU memory above those."""
    source = open_single_file(path)
    model = source.family.transformer.build(source.transformer_config)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = load_weights(model, source.weights("transformer"), {}, device=GPU, dtype=dtype, fp8=fp8)
    torch.cuda.synchronize()
    return model, held, torch.cuda.max_memory_allocated() - before - held


def test_little_gpu_memory_beside_the_weights(tmp_path):
    path = random_file(tmp_path / "model.safetensors", SIZE)
    for dtype in (torch.bfloat16, torch.float32):
        model, held, above = load_on_gpu(path, dtype=dtype)
        assert held > 1.4e9 * dtype.itemsize
        # At most what the ring holds, cast: far from the GiB that is allowed.
        assert above <= 4 * BUFFERS * BUFFER_BYTES
        del model


@pytest.mark.parametrize("fp8", ["stored", "cast"])
def test_little_gpu_memory_beside_weights_in_8_bits(tmp_path, fp8):
    path = random_file(tmp_path / "bf16.safetensors", {"heads": 12, "double": 1, "single": 8})
    with safe_open(path, "pt") as own:
        tensors = {name: own.get_tensor(name).float() for name in own.keys()}  # noqa: SIM118
    in_fp8, metadata = to_fp8(tensors, "metadata")
    _, held, above = load_on_gpu(write(tmp_path / "fp8.safetensors", in_fp8, metadata=metadata), fp8)
    assert held > 3e8
    assert above <= 4 * BUFFERS * BUFFER_BYTES


def test_the_host_waits_once(tmp_path):
    path = random_file(tmp_path / "model.safetensors", {"heads": 12, "double": 1, "single": 4})
    load_on_gpu(path)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source = open_single_file(path)
            model = source.family.transformer.build(source.transformer_config)
            load_weights(model, source.weights("transformer"), {}, device=GPU, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing" in str(warning.message)]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["up.weight", "split.weight"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_values_that_are_no_numbers(tmp_path, name, value, dtype):
    weights = stored(random_model(), tmp_path)
    load(weights, 4, 3, dtype, GPU)
    tensor = poison(weights, name, -1, -1, torch.tensor(value).numpy().tobytes())
    load(weights, 4, 0, dtype, GPU)
    with pytest.raises(ValueError, match=re.escape(f"{name} in {tensor.file} holds values that are not finite")):
        load(weights, 4, 3, dtype, GPU)


@pytest.mark.parametrize(("dtype", "byte"), [(torch.float8_e4m3fn, 0xFF), (torch.float8_e5m2, 0xFC)])
@pytest.mark.parametrize("fp8", ["stored", "cast"])
def test_8_bits_that_are_no_numbers(tmp_path, fp8, dtype, byte):
    weights = stored(random_model(), tmp_path, lambda name, tensor: tensor.to(dtype) if tensor.ndim == 2 else tensor)
    load(weights, fp8=fp8, dtype=torch.bfloat16, device=GPU)
    tensor = poison(weights, "up.weight", 0, 0, bytes([byte]))
    with pytest.raises(ValueError, match=re.escape(f"up.weight in {tensor.file} holds values that are not finite")):
        load(weights, fp8=fp8, dtype=torch.bfloat16, device=GPU)
