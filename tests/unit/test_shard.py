"""Which part of a weight a rank holds: Shard.ranges and ParamShard.take against torch's own chunking."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from parallel_backend.mesh import Axis
from parallel_backend.parallel.sequence import split_sizes
from parallel_backend.parallel.tensor import ParamShard, Shard, apply_tensor_parallel


def axis(degree: int, rank: int = 0) -> Axis:
    return Axis(group=None, degree=degree, rank=rank)


def param_shard(shard: Shard, full: torch.Tensor, degree: int, rank: int) -> ParamShard:
    size = full.shape[shard.dim]
    return ParamShard(shard.dim, tuple(shard.ranges(size, axis(degree, rank))), size)


def part(shard: Shard, full: torch.Tensor, degree: int, rank: int) -> torch.Tensor:
    """What a rank of an axis takes of a full weight."""
    return param_shard(shard, full, degree, rank).take(full)


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize(("style", "dim"), [("column", 0), ("row", 1), ("embedding", 1)])
def test_one_block_is_cut_like_torch_chunk(style, dim, degree):
    full = torch.randn(16, 24)
    parts = [part(Shard(style), full, degree, rank) for rank in range(degree)]
    for actual, expected in zip(parts, full.chunk(degree, dim), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(torch.cat(parts, dim), full)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize(("style", "dim"), [("column", 0), ("row", 1)])
def test_fused_blocks_are_cut_one_by_one(style, dim, degree):
    blocks = (8, 8, 8, 20, 20)  # q, k, v, gate, up
    full = torch.randn(64, 64)
    fused = full.split(blocks, dim)
    parts = [part(Shard(style, blocks=blocks), full, degree, rank) for rank in range(degree)]
    for rank, actual in enumerate(parts):
        assert torch.equal(actual, torch.cat([block.chunk(degree, dim)[rank] for block in fused], dim))
    # Every block re-assembles from the ranks' parts of it.
    local = [size // degree for size in blocks]
    whole = [torch.cat(pieces, dim) for pieces in zip(*(rank.split(local, dim) for rank in parts), strict=True)]
    assert torch.equal(torch.cat(whole, dim), full)


@pytest.mark.parametrize("units", [1, 2, 4, 8])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_a_rank_holds_the_kv_heads_that_its_query_heads_attend_to(units, degree):
    heads, head_dim = 8, 4
    full = torch.randn(units, head_dim, 10)
    # transformers' repeat_kv: query head h attends to kv head h // (heads / units).
    of_each_query_head = full.repeat_interleave(heads // units, dim=0)
    for rank in range(degree):
        held = part(Shard("column", units=units), full.flatten(0, 1), degree, rank).unflatten(0, (-1, head_dim))
        local_heads = heads // degree
        wanted = of_each_query_head[rank * local_heads : (rank + 1) * local_heads]
        assert torch.equal(held.repeat_interleave(local_heads // held.shape[0], dim=0), wanted)


def test_ranges_of_a_kv_shard_are_shared_by_neighbours():
    shard = Shard("column", units=2)
    assert [shard.ranges(32, axis(4, rank)) for rank in range(4)] == [[(0, 16)], [(0, 16)], [(16, 32)], [(16, 32)]]


@pytest.mark.parametrize(
    ("shard", "size", "degree", "numbers"),
    [
        (Shard("column"), 10, 4, ("10 features", "4 tensor-parallel ranks")),
        (Shard("row"), 7, 2, ("7 features", "2 tensor-parallel ranks")),
        (Shard("column", blocks=(8, 6)), 14, 4, ("6 features", "4 tensor-parallel ranks")),
        (Shard("column", units=3), 48, 8, ("3 heads", "8 ranks")),
        (Shard("column", units=8), 48, 3, ("8 heads", "3 ranks")),  # 16 features a rank would be two heads and a half
    ],
    ids=["column", "row", "second block", "more ranks than kv heads", "fewer ranks than kv heads"],
)
def test_what_does_not_divide_is_refused_by_name_and_number(shard, size, degree, numbers):
    with pytest.raises(ValueError, match=r"attn\.to_k: ") as caught:
        shard.ranges(size, axis(degree), "attn.to_k")
    for number in numbers:
        assert number in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [Shard("column"), Shard("row"), Shard("column", blocks=(4, 8, 4)), Shard("row", blocks=(4, 12))],
    ids=["column", "row", "packed column", "packed row"],
)
def test_a_slice_of_a_file_is_the_slice_of_the_tensor(tmp_path, shard):
    full = torch.randn(16, 16)
    save_file({"weight": full}, tmp_path / "x.safetensors")
    for rank in range(4):
        with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as reader:
            read = param_shard(shard, full, 4, rank).take(reader.get_slice("weight"))
        assert read.numel() == full.numel() // 4
        assert torch.equal(read, part(shard, full, 4, rank))


def test_biases_are_cut_like_the_rows_of_their_weight(tmp_path):
    full = torch.randn(12)
    save_file({"bias": full}, tmp_path / "x.safetensors")
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as reader:
        read = ParamShard(0, ((2, 4), (8, 11)), 12).take(reader.get_slice("bias"))
    assert torch.equal(read, full[[2, 3, 8, 9, 10]])


def test_a_plan_cuts_real_and_meta_weights_alike():
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.ModuleDict(
            {"up": torch.nn.Linear(8, 16), "down": torch.nn.Linear(16, 8), "embed": torch.nn.Embedding(5, 8)}
        )

    plan = {"up": Shard("column", blocks=(8, 8)), "down": Shard("row"), "embed": Shard("embedding")}
    full = model().state_dict()
    for rank in range(2):
        real = model()
        table = apply_tensor_parallel(real, plan, axis(2, rank))
        with torch.device("meta"):
            meta = model()
        assert apply_tensor_parallel(meta, plan, axis(2, rank)) == table
        shapes = {name: parameter.shape for name, parameter in meta.named_parameters()}
        assert shapes == {name: parameter.shape for name, parameter in real.named_parameters()}
        first, second = full["up.weight"].split(8)
        expected = {
            "up.weight": torch.cat([first.chunk(2)[rank], second.chunk(2)[rank]]),
            "up.bias": full["up.bias"].view(2, 2, 4)[:, rank].flatten(),
            "down.weight": full["down.weight"].chunk(2, 1)[rank],
            "down.bias": full["down.bias"],  # whole: it is added after the sum
            "embed.weight": full["embed.weight"].chunk(2, 1)[rank],
        }
        actual = real.state_dict()
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name
        assert set(table) == set(expected) - {"down.bias"}


def test_an_axis_of_one_changes_nothing():
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 16)})
    before = model["up"]
    assert apply_tensor_parallel(model, {"up": Shard("column")}, axis(1)) == {}
    assert model["up"] is before


def test_a_weight_that_does_not_divide_is_named():
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 10)})
    with pytest.raises(ValueError, match=re.escape("up: 10 features do not divide over 4 tensor-parallel ranks")):
        apply_tensor_parallel(model, {"up": Shard("column")}, axis(4))


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 1000])
def test_split_sizes_are_those_of_tensor_split(length, parts):
    sizes = [len(piece) for piece in torch.arange(length).tensor_split(parts)]
    assert split_sizes(length, parts) == sizes
    assert split_sizes(length, parts, extras_last=True) == sizes[::-1]
