"""CUDA attention kernels, without log-sum-exp (Ulysses) and with it (ring), in bf16 against fp32 math."""

import pytest
import torch

from parallel_backend.parallel.elementwise import merge
from parallel_backend.parallel.kernels import attention, attention_with_lse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Rank-local shapes of FLUX.2-dev at 1024 x 1024 (4096 + 512 tokens, 48 heads x 128): batch, queries, keys, heads, dim.
SHAPES = {
    "one GPU": (1, 4608, 4608, 48, 128),
    "TP-8 and Ulysses-8": (1, 4608, 4608, 6, 128),
    "Ulysses-4-TP-2, odd length": (1, 4507, 4507, 6, 128),
    "Ring-8 hop": (1, 576, 576, 48, 128),
    "Ring-4-TP-2 hop, batch 2": (2, 1152, 1152, 24, 128),
    "USP-2-2-TP-2 hop, uneven": (1, 2253, 2254, 12, 128),
    "demo model": (1, 197, 197, 4, 24),
}


def draw(shape, dtype=torch.bfloat16, seed=0):
    batch, queries, keys, heads, dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(batch, length, heads, dim, device="cuda", generator=generator).to(dtype)
        for length in (queries, keys, keys)
    ]


def exact(query, key, value):
    """Softmax attention and log-sum-exp in fp32, head by head: ``[B, S, H, D]`` and ``[B, S, H, 1]``."""
    outs, lses = [], []
    for head in range(query.shape[2]):
        q, k, v = (x[:, :, head].double() if x.shape[1] < 1000 else x[:, :, head].float() for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
        outs.append((scores.softmax(-1) @ v).float())
        lses.append(scores.logsumexp(-1).float())
    return torch.stack(outs, 2), torch.stack(lses, 2).unsqueeze(-1)


def relative(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def _full_precision_reference():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# bf16 keeps 8 bits: rounding the probabilities and the output costs about 2^-9 each.
TOLERANCE = 5e-3


@pytest.mark.parametrize("name", SHAPES)
def test_attention(name):
    query, key, value = draw(SHAPES[name])
    expected, _ = exact(query, key, value)
    assert relative(attention(query, key, value), expected) <= TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_attention_with_lse(name):
    query, key, value = draw(SHAPES[name])
    expected, expected_lse = exact(query, key, value)
    out, lse = attention_with_lse(query, key, value)
    assert relative(out, expected) <= TOLERANCE
    assert lse.shape == expected_lse.shape
    assert (lse - expected_lse).abs().max().item() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_merged_chunks_equal_the_whole(dtype):
    query, key, value = draw((1, 1000, 1001, 6, 128), dtype)
    expected, _ = exact(query, key, value)
    out = lse = None
    for keys, values in zip(key.split(334, 1), value.split(334, 1), strict=True):
        part, part_lse = attention_with_lse(query, keys, values)
        out, lse = (part, part_lse) if out is None else merge(out, lse, part, part_lse, torch.float32)
    assert relative(out, expected) <= (TOLERANCE if dtype == torch.bfloat16 else 1e-5)
