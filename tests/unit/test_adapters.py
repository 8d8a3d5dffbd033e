"""Patches of weights: what a slice gets is the slice of what the full weight gets, for all kinds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel_backend.loading import adapters
from parallel_backend.loading.adapters import (
    AdapterSet,
    Patch,
    branch_of,
    described,
    from_description,
    patch_rows,
    same_patches,
    strengths_of,
)

ROWS, COLUMNS = 24, 20


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(rows: int = ROWS, columns: int = COLUMNS, **how) -> Patch:
    return Patch("lora", (random(rows, 3), random(3, columns)), 0.7, **how)


PATCHES = {
    "lora": ([lora()], lambda w: w + 0.7 * random(ROWS, 3) @ random(3, COLUMNS)),
    "loha": (
        [Patch("loha", (random(ROWS, 2), random(2, COLUMNS), random(ROWS, 4), random(4, COLUMNS)), -1.5)],
        lambda w: w - 1.5 * (random(ROWS, 2) @ random(2, COLUMNS)) * (random(ROWS, 4) @ random(4, COLUMNS)),
    ),
    "lokr": (
        [Patch("lokr", (random(4, 5), random(6, 4)), 2.0)],
        lambda w: w + 2 * torch.kron(random(4, 5), random(6, 4)),
    ),
    "diff": ([Patch("diff", (random(ROWS, COLUMNS),), 0.5)], lambda w: w + 0.5 * random(ROWS, COLUMNS)),
    "set, then diff": (
        [Patch("set", (random(ROWS, COLUMNS),)), Patch("diff", (torch.ones(ROWS, COLUMNS),), 2.0)],
        lambda w: random(ROWS, COLUMNS) + 2,
    ),
    "rows of it": (
        [lora(8, offset=(0, 10, 8))],
        lambda w: torch.cat([w[:10], w[10:18] + 0.7 * random(8, 3) @ random(3, COLUMNS), w[18:]]),
    ),
    "columns of it": (
        [lora(columns=7, offset=(1, 5, 7))],
        lambda w: torch.cat([w[:, :5], w[:, 5:12] + 0.7 * random(ROWS, 3) @ random(3, 7), w[:, 12:]], dim=1),
    ),
    "halves swapped": (
        [lora(swap=True)],
        lambda w: w + 0.7 * torch.cat((random(ROWS, 3) @ random(3, COLUMNS)).chunk(2)[::-1]),
    ),
    "scaled, then more": (
        [Patch("scale", (), model_strength=0.5), lora(model_strength=2.0)],
        lambda w: w + 0.7 * random(ROWS, 3) @ random(3, COLUMNS),
    ),
}


@pytest.mark.parametrize("name", PATCHES)
@pytest.mark.parametrize("chunk", [10**6, 40])
def test_slices(name, chunk, monkeypatch):
    monkeypatch.setattr(adapters, "CHUNK_ELEMENTS", chunk)
    patches, wanted = PATCHES[name]
    full = random(ROWS, COLUMNS) + 1
    expected = wanted(full)
    for patch in patches:
        patch.check(full.shape)
    for first, last in ((0, ROWS), (0, 9), (9, ROWS), (11, 13)):
        for columns in (((0, COLUMNS),), ((0, 4), (10, 17)), ((6, 20),)):
            part = torch.cat([full[first:last, a:b] for a, b in columns], dim=1)
            patch_rows(part, first, columns, patches)
            assert torch.allclose(part, torch.cat([expected[first:last, a:b] for a, b in columns], dim=1), atol=1e-5)


def test_vectors():
    bias = random(ROWS)
    part = bias[5:9].clone()
    patch_rows(part, 5, (), [Patch("diff", (torch.arange(ROWS).float(),), 0.5)])
    assert torch.equal(part, bias[5:9] + 0.5 * torch.arange(5, 9))


def test_bf16_is_rounded_once():
    weight = random(ROWS, COLUMNS).bfloat16()
    part = weight.clone()
    patch_rows(part, 0, ((0, COLUMNS),), [lora(), lora(), lora()])
    assert torch.equal(part, (weight.float() + 3 * (0.7 * random(ROWS, 3) @ random(3, COLUMNS))).bfloat16())


@pytest.mark.parametrize("name", ["lora", "rows of it", "columns of it", "halves swapped"])
def test_branch(name):
    """What stands beside a weight adds what would have been merged into it; what is left of its rank adds nothing."""
    patches, wanted = PATCHES[name]
    full = torch.zeros(ROWS, COLUMNS)
    expected = wanted(full) + 2 * wanted(full)
    columns, twice = ((2, 9), (12, 20)), [*patches, *(replace(patch, strength=2 * patch.strength) for patch in patches)]
    parts = [(twice, [(0, 16, 6), (6, 3, 8)])]
    down, up = branch_of(parts, (14, 15), columns, 16, torch.float32, torch.device("cpu"))
    rows, strengths = torch.cat([expected[16:22], expected[3:11]]), strengths_of(twice, 16)
    assert torch.allclose(up * strengths @ down, torch.cat([rows[:, a:b] for a, b in columns], dim=1), atol=1e-5)
    assert (down.shape, up.shape) == ((16, 15), (14, 16))
    assert not strengths[6:].any()


def test_same_but_strengths():
    one = AdapterSet("one", {"a": [lora(), lora(offset=(0, 0, 24))], "b": [Patch("diff", (random(3),))]})
    other = AdapterSet("other", {key: [replace(p, strength=3.0) for p in of] for key, of in one.patches.items()})
    assert one.same_but_strengths(other)
    assert not same_patches(one.patches, other.patches)
    assert same_patches(one.patches, dict(one.patches))
    first, second = one.patches["a"]
    for a in ([first], [first, second, second], [lora(), second], [first, replace(second, swap=True)]):
        assert not one.same_but_strengths(AdapterSet("other", {**one.patches, "a": a}))
    assert not one.same_but_strengths(AdapterSet("other", {"a": one.patches["a"]}))


def test_what_does_not_fit_is_told_with_both_shapes():
    with pytest.raises(ValueError, match=r"has the shape \[24, 20\], the model \[24, 16\]"):
        lora().check((24, 16))
    with pytest.raises(ValueError, match=r"has lengths \[20, 1\] \(dora_scale\) for rows or columns of \[24, 20\]"):
        lora(dora=random(20, 1)).check((24, 20))
    with pytest.raises(ValueError, match=r"rotates 24 rows, the model has \[20, 24\]"):
        Patch("oft", (random(3, 8, 8),)).check((20, 24))
    with pytest.raises(ValueError, match=r"multiplies columns by \[20, 16\], the model has \[24, 20\]"):
        Patch("glora", (random(24, 3), random(3, 20), random(20, 3), random(3, 16))).check((24, 20))
    with pytest.raises(ValueError, match=r"changes 8 from 20 on of dim 0 of a weight \[24, 20\]"):
        lora(8, offset=(0, 20, 8)).check((24, 20))
    Patch("scale", (), model_strength=0.5).check((1, 1))


def test_description():
    dora = lora(dora=random(ROWS, 1), alpha=0.5, switched=True)
    adapters = AdapterSet("one", {"a": [lora(offset=(0, 0, 24)), Patch("scale", (), model_strength=2.0), dora]})
    names: dict[str, Tensor] = {}

    def name_of(tensor: Tensor) -> str:
        names[f"t{len(names)}"] = tensor
        return f"t{len(names) - 1}"

    text = json.loads(json.dumps(described(adapters, name_of)))
    assert from_description("one", text, names) == adapters
    for patch in (
        ["lora", ["t0"], 1, 1, None, False, 1, False],
        ["diff", ["t0", "t1", "t2"], 1, 1, None, False, 1, False],
        ["x", [], 1, 1, None, False, 1, False],
        ["scale", [], 1, 1, None, False, 1],
        3,
    ):
        broken = {"a": [patch]}
        with pytest.raises(ValueError, match="patch"):
            from_description("one", broken, names)
