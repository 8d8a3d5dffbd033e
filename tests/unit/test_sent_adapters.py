"""Which tensors of patches cross to the ranks, and how many bytes stay with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel_backend.loading.adapters import ALIGNMENT, NO_ADAPTERS, AdapterSet, Patch, unpacked
from parallel_backend.runtime.client import adapters
from parallel_backend.runtime.client.adapters import SentAdapters

ROWS, COLUMNS, RANK = 24, 20, 4


def lora(name: str, seed: int, dtype: torch.dtype = torch.float32, strength: float = 1.0) -> AdapterSet:
    generator = torch.Generator().manual_seed(seed)
    pair = (torch.randn(ROWS, RANK, generator=generator), torch.randn(RANK, COLUMNS, generator=generator))
    return AdapterSet(name, {"a.weight": [Patch("lora", tuple(t.to(dtype) for t in pair), strength)]})


def send(sent: SentAdapters, one: AdapterSet) -> tuple[int, list[str], dict[str, Tensor]]:
    """Bytes of tensors that a message has, the names that ranks forget, and what they get."""
    message, forget = sent.prepare(one)
    got: dict[str, Tensor] = {}
    unpacked(message["index"], message["data"], got)
    sent.done(one)
    return message["data"].nbytes, forget, got


def test_two_that_alternate_are_sent_once():
    """Two MODELs of one base in one prompt, prompt after prompt; other strengths, none, and a file read again."""
    sent, high, low = SentAdapters(), lora("high", 1), lora("low", 2)
    assert send(sent, high)[0] > 0
    assert send(sent, low)[0] > 0
    for one in (high, low, NO_ADAPTERS, high, low):
        assert send(sent, one)[:2] == (0, [])
    of = {key: [replace(patch, strength=0.3) for patch in found] for key, found in high.patches.items()}
    assert send(sent, AdapterSet("weaker", of))[0] == 0
    assert send(sent, lora("high, read again", 1))[0] == 0
    assert send(sent, lora("another", 3))[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64,
                                   torch.float8_e4m3fn, torch.float8_e5m2])  # fmt: skip
def test_every_dtype_of_a_file_arrives_with_its_values(dtype):
    one = lora("one", 1, dtype)
    size, _, got = send(SentAdapters(), one)
    assert size <= 4 * (ROWS + COLUMNS) * RANK + 2 * ALIGNMENT
    wanted = one.patches["a.weight"][0].tensors
    for arrived, tensor in zip(got.values(), wanted, strict=True):
        assert torch.equal(arrived.float(), tensor.float())


def test_what_stays_in_host_memory_is_bounded(monkeypatch):
    """Over many LoRAs, one after the other: those that are not on any more make room, and are sent again if wanted."""
    size = 4 * (ROWS + COLUMNS) * RANK
    monkeypatch.setattr(adapters, "KEPT_BYTES", 3 * size)
    sent, ranks, most = SentAdapters(), dict[str, Tensor](), 0
    for number in range(12):
        _, forget, got = send(sent, lora(f"{number}", number))
        ranks |= got
        for name in forget:
            del ranks[name]
        held = sum(tensor.nbytes for tensor in sent._held.values())
        assert held == sum(tensor.nbytes for tensor in ranks.values()), "both sides forget the same"
        most = max(most, held)
    assert most == 3 * size
    assert send(sent, lora("first again", 0))[0] > 0
    assert send(sent, lora("last", 11))[0] == 0


def test_a_set_that_is_on_stays_however_large(monkeypatch):
    monkeypatch.setattr(adapters, "KEPT_BYTES", 1)
    sent, one = SentAdapters(), lora("one", 1)
    send(sent, one)
    weaker = AdapterSet("weaker", {key: [replace(p, strength=0.5) for p in of] for key, of in one.patches.items()})
    assert send(sent, weaker)[:2] == (0, [])
