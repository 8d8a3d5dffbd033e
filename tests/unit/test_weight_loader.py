"""Filling a model: every parameter against safetensors' own reading, through buffers of any size, as any dtype."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from parallel_backend.loading import staging, targets
from parallel_backend.loading.file_reader import FileReader
from parallel_backend.loading.safetensors_reader import Weight, read_header, whole
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.products import Product, named_weights
from parallel_backend.parallel.tensor import Shard, apply_tensor_parallel

CPU = torch.device("cpu")
PLAN = {
    "up": Shard("column"),
    "fused": Shard("column", blocks=(16, 48)),
    "down": Shard("row"),
    "split": Shard("row", blocks=(8, 24)),
    "words": Shard("embedding"),
}


class Model(nn.Module):
    """Each way in which a weight is sharded, and parameters of odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.fused = nn.Linear(12, 64, bias=False)
        self.down = nn.Linear(48, 20)
        self.split = nn.Linear(32, 9, bias=False)
        self.words = nn.Embedding(11, 16)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.LayerNorm(13)
        self.scalar = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.randn(0, 6))


def random_model() -> Model:
    torch.manual_seed(0)
    return Model()


def stored(model, folder, change=lambda name, tensor: tensor, files=2):
    """A model's parameters in a few files, and what they are made of."""
    groups: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for index, (name, parameter) in enumerate(model.named_parameters()):
        groups[index % files][name] = change(name, parameter.detach().clone())
    weights = {}
    for index, group in enumerate(groups):
        save_file(group, folder / f"{index}.safetensors")
        weights |= {name: whole(tensor) for name, tensor in read_header(folder / f"{index}.safetensors").items()}
    return weights


def load(weights, degree=1, rank=0, dtype=torch.float32, device=CPU, **options):
    with torch.device("meta"):
        model = Model()
    table = apply_tensor_parallel(model, PLAN, Axis(None, degree, rank))
    held = load_weights(model, weights, table, device=device, dtype=dtype, **options)
    weights_held = named_weights(model).values()
    assert held == sum((one.weight if isinstance(one, Product) else one).nbytes for one in weights_held)
    return model, table


@pytest.fixture(params=[8 * 2**20, 1024, 48], ids=lambda size: f"buffers of {size}")
def buffer_bytes(request, monkeypatch):
    """48 bytes are less than most rows."""
    for module in (staging, targets):
        monkeypatch.setattr(module, "BUFFER_BYTES", request.param)


STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.mark.usefixtures("buffer_bytes")
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("stored_as", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_is_safetensors_own(tmp_path, degree, stored_as, dtype):
    weights = stored(random_model(), tmp_path, lambda _, tensor: tensor.to(stored_as))
    for rank in range(degree):
        model, table = load(weights, degree, rank, dtype)
        assert (set(table) == {f"{name}.weight" for name in PLAN} | {"up.bias"}) == (degree > 1)
        for name, parameter in model.named_parameters():
            tensor = weights[name].pieces[0][0]
            with safe_open(tensor.file, "pt") as own:
                full = own.get_tensor(name)
            assert full.dtype == stored_as
            expected = (table[name].take(full) if name in table else full).to(dtype)
            assert parameter.dtype == dtype
            assert torch.equal(parameter, expected), (rank, name)


@pytest.mark.usefixtures("buffer_bytes")
def test_parameters_of_several_pieces_and_dtypes(tmp_path):
    """The second half first, from a tensor in another dtype than the rest of it."""
    model = random_model()
    weights = stored(model, tmp_path)
    save_file({"low": model.up.weight[:20].detach().bfloat16()}, tmp_path / "low.safetensors")
    low, high = read_header(tmp_path / "low.safetensors")["low"], weights["up.weight"].pieces[0][0]
    weights["up.weight"] = Weight(((high, 20, 40), (low, 3, 20), (low, 0, 3)))
    full = torch.cat([model.up.weight[20:], model.up.weight[3:20].bfloat16(), model.up.weight[:3].bfloat16()])
    for degree in (1, 2, 4):
        for rank in range(degree):
            loaded, table = load(weights, degree, rank)
            expected = table["up.weight"].take(full) if degree > 1 else full
            assert torch.equal(loaded.up.weight, expected)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_just_the_bytes_of_the_shard_are_read(tmp_path, degree, read):
    weights = stored(random_model(), tmp_path)
    model, _ = load(weights, degree, degree - 1)
    assert sum(read) == sum(parameter.nbytes for parameter in model.parameters())


FP8 = {torch.float8_e4m3fn: [0x7F, 0xFF], torch.float8_e5m2: [0x7C, 0x7E, 0xFC, 0xFF]}


@pytest.mark.usefixtures("buffer_bytes")
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("dtype", FP8)
def test_8_bits_stay_as_they_are_in_linears_and_are_cast_elsewhere(tmp_path, degree, dtype):
    weights = stored(random_model(), tmp_path, lambda name, tensor: tensor.to(dtype) if tensor.ndim == 2 else tensor)
    for rank in range(degree):
        model, table = load(weights, degree, rank, torch.bfloat16, fp8="stored")
        for name, held in named_weights(model).items():
            tensor = weights[name].pieces[0][0]
            with safe_open(tensor.file, "pt") as own:
                full = own.get_tensor(name)
            linear = name in ("up.weight", "fused.weight", "down.weight", "split.weight")
            assert held.dtype == (dtype if linear else torch.bfloat16)
            parameter = held.dense(torch.bfloat16) if linear else held
            full = full.bfloat16()  # which has room for all of them
            assert torch.equal(parameter.bfloat16(), table[name].take(full) if name in table else full), (rank, name)


def poison(weights, name, row, column, data):
    """Write bytes over a value of a stored matrix."""
    tensor, _, _ = weights[name].pieces[0]
    index = row % tensor.shape[0] * tensor.shape[1] + column % tensor.shape[1]
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset + index * len(data))
        stream.write(data)
    return tensor


@pytest.mark.parametrize("degree", [1, 4])
@pytest.mark.parametrize("name", ["up.weight", "split.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_no_number_is_found_by_the_rank_that_holds_it(tmp_path, degree, name, value):
    weights = stored(random_model(), tmp_path)
    tensor = poison(weights, name, -1, -1, torch.tensor(value).numpy().tobytes())
    for rank in range(degree - 1):
        load(weights, degree, rank)
    with pytest.raises(ValueError, match=re.escape(f"{name} in {tensor.file} holds values that are not finite")):
        load(weights, degree, degree - 1)


@pytest.mark.parametrize("fp8", ["stored", "cast"])
@pytest.mark.parametrize(("dtype", "byte"), [(dtype, byte) for dtype, values in FP8.items() for byte in values])
def test_8_bits_that_are_no_number_are_found(tmp_path, fp8, dtype, byte):
    weights = stored(random_model(), tmp_path, lambda name, tensor: tensor.to(dtype) if tensor.ndim == 2 else tensor)
    largest = torch.tensor(torch.finfo(dtype).max).to(dtype).view(torch.uint8).item()
    for fine in (largest, largest + 0x80, 0x80):
        poison(weights, "up.weight", 0, 0, bytes([fine]))
        load(weights, fp8=fp8, dtype=torch.bfloat16)
    tensor = poison(weights, "up.weight", 0, 0, bytes([byte]))
    with pytest.raises(ValueError, match=re.escape(f"up.weight in {tensor.file} holds values that are not finite")):
        load(weights, fp8=fp8, dtype=torch.bfloat16)


def test_values_too_large_for_the_dtype_are_not_finite(tmp_path):
    weights = stored(random_model(), tmp_path, lambda _, tensor: tensor * 1e5)
    with pytest.raises(ValueError, match="not finite"):
        load(weights, dtype=torch.float16)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_cut_off_after_its_header_was_read(tmp_path, which):
    """Of several files, one; the error names it and a tensor in it."""
    weights = stored(random_model(), tmp_path, files=3)
    file = tmp_path / f"{which}.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=re.escape(f" in {file} cannot be read: {file} has ")) as caught:
        load(weights)
    key = str(caught.value).split(" in ")[0]
    assert weights[key].pieces[0][0].file == file


def test_a_file_cut_off_while_it_is_read(tmp_path, monkeypatch):
    weights = stored(random_model(), tmp_path, files=1)
    last = max((weight.pieces[0][0] for weight in weights.values()), key=lambda tensor: tensor.offset)
    opened = FileReader._open_file

    def cut(file):
        found = opened(file)
        os.truncate(file, last.offset + 1)
        return found

    monkeypatch.setattr(FileReader, "_open_file", staticmethod(cut))
    with pytest.raises(ValueError, match=re.escape(f"{last.key} in {last.file} cannot be read")):
        load(weights)


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    weights = stored(random_model(), tmp_path, lambda name, tensor: tensor.to(torch.uint16) if "up" in name else tensor)
    with pytest.raises(ValueError, match=r"up\.(weight|bias) in .* is stored as U16, which is not read"):
        load(weights)
