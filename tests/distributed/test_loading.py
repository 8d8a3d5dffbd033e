"""Ranks that load one checkpoint together: right slices, each byte read once, and one error for all."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from parallel_backend import ParallelismConfig
from tests.distributed import loading_cases
from tests.single_file import flux2_tensors, to_fp8, to_fp8_rows, write

LAYOUTS = {
    "Ulysses-2-TP-2": ParallelismConfig(ulysses_size=2, tp_size=2),
    "Ring-4": ParallelismConfig(ring_size=4),
    "USP-2-2-TP-2": ParallelismConfig(ulysses_size=2, ring_size=2, tp_size=2),
}


@pytest.mark.parametrize("name", ["Ulysses-2-TP-2", "USP-2-2-TP-2"])
def test_replicas_share_the_reading(world, tmp_path, name):
    layout, tensors = LAYOUTS[name], flux2_tensors(heads=4, double=1, single=2)
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    results = world.run(loading_cases.load, layout, str(write(tmp_path / "model.safetensors", tensors)))
    for parameters, table, _, raised in results:
        assert raised == ""
        for key, parameter in parameters.items():
            assert torch.equal(parameter, table[key].take(expected[key]) if key in table else expected[key]), key
    for tp in range(layout.tp_size):
        replicas = results[tp :: layout.tp_size]
        held = sum(parameter.nbytes for parameter in replicas[0][0].values())
        read = [count for _, _, count, _ in replicas]
        assert sum(read) == held  # each byte once, by one of them
        assert max(read) <= 1.5 * held / len(read)


@pytest.mark.parametrize("row", [0, -1])
def test_one_rank_s_error_is_everyone_s(world, tmp_path, row):
    """The bad value is in the shard of one tp rank, which one of its replicas reads."""
    tensors = flux2_tensors(heads=4, double=1, single=1)
    tensors["double_blocks.0.img_attn.qkv.weight"][row, 3] = float("nan")
    path = str(write(tmp_path / "model.safetensors", tensors))
    errors = [raised for *_, raised in world.run(loading_cases.load, LAYOUTS["Ulysses-2-TP-2"], path)]
    assert len(set(errors)) == 1
    assert "double_blocks.0.img_attn.qkv.weight in" in errors[0]
    assert "not finite" in errors[0]


def test_a_file_cut_off_for_one_rank_is_everyone_s_error(world, tmp_path):
    """The last tensor of the file is a hole; the replica that reads it goes on to the last broadcast all the same."""
    path = write(tmp_path / "model.safetensors", flux2_tensors(heads=4, double=1, single=1))
    errors = [raised for *_, raised in world.run(loading_cases.load, LAYOUTS["Ring-4"], str(path), cut=1000)]
    assert len(set(errors)) == 1
    assert str(path) in errors[0]
    assert "cannot be read: the file ends at byte" in errors[0]


def test_fp8_is_shared_as_it_is(world, tmp_path):
    stored, metadata = to_fp8(flux2_tensors(heads=4, double=1, single=2), "metadata")
    path = str(write(tmp_path / "model.safetensors", stored, metadata=metadata))
    results = world.run(loading_cases.load, LAYOUTS["Ring-4"], path, fp8="stored")
    key = "single_blocks.1.linear2.weight"
    for parameters, _, _, raised in results:
        assert raised == ""
        found = parameters["single_transformer_blocks.1.attn.to_out.weight"]
        assert found.dtype == torch.float8_e4m3fn
        assert torch.equal(found.float(), stored[key].float())


def test_scales_of_rows_where_replicas_share_the_reading(world, tmp_path):
    """A rank that does not read a weight has its scales all the same, and each rank those of its rows."""
    stored, meant = to_fp8_rows(flux2_tensors(heads=4, double=1, single=2))
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(meant))
    path = str(write(tmp_path / "model.safetensors", stored))
    for parameters, table, _, raised in world.run(loading_cases.load, LAYOUTS["Ulysses-2-TP-2"], path):
        assert raised == ""
        for key, parameter in parameters.items():
            assert torch.equal(parameter, table[key].take(expected[key]) if key in table else expected[key]), key
