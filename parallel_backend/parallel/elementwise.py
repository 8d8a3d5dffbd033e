"""What a block computes between its matrix products, and a cache between blocks: one kernel each where Triton can.

Everything has a plain form in PyTorch, which the CPU runs. In eager code on a GPU the kernels of `triton_kernels` run;
the compiler fuses the plain form itself, but for `pack` and `turn`, whose shuffles it does not, and `modulated_norm`,
for which it would read its input twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..machine import missing_build_tools
from . import exchange

try:
    from . import triton_kernels
except ImportError:  # where PyTorch comes without Triton
    triton_kernels = None  # type: ignore[assignment]
if missing_build_tools():
    triton_kernels = None  # type: ignore[assignment]


class Table(NamedTuple):
    """Modulation: a row of values ``[n * B, C]`` for each sample, or n for a sample, of which each token takes one.

    ``picks`` ``[B, S]`` says which; None where n is 1. Values may be in fp32 where tokens are not.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor
    picks: Tensor | None = None


class Pieces(NamedTuple):
    """An output ``[B, S, C]`` in pieces along a dim, which may be in flight."""

    tensors: Sequence[Tensor | exchange.InFlight]
    dim: int = 1

    def summands(self, index: int) -> tuple[Tensor, ...]:
        """What has to be added up for a piece, once it is there; the first is memory that may be written to."""
        piece = self.tensors[index]
        return exchange.summands(piece) if isinstance(piece, exchange.InFlight) else (piece,)


class HeadInputs(NamedTuple):
    """Queries, keys and values of a stream's tokens ``[B, S, H * D]`` and the weights of their norms.

    Those are ``[D]`` where each head is normed by itself, ``[H * D]`` where all are together (see `pack`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_weight: Tensor
    key_weight: Tensor
    eps: float


def has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels may work on a tensor: they know nothing of gradients."""
    return triton_kernels is not None and x.is_cuda and not torch.is_grad_enabled()


def modulated_norm(x: Tensor, table: Table, eps: float) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` of ``[B, S, C]``."""
    if has_kernels(x):
        run = torch.ops.hybrid_dit.modulated_norm if torch.compiler.is_compiling() else _norm_with_kernel
        return run(x, table.shift, table.scale, eps, table.picks)
    return _plain_norm(x, table, eps)


def _plain_norm(x: Tensor, table: Table, eps: float) -> Tensor:
    shift, scale = (_of_tokens(values, table.picks) for values in (table.shift, table.scale))
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def _norm_with_kernel(x: Tensor, shift: Tensor, scale: Tensor, eps: float, picks: Tensor | None) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    triton_kernels.add_norm(x, None, None, None, None, shift, scale, out, eps, picks)
    return out


def gated_add(x: Tensor, gate: Table, pieces: Pieces) -> Tensor:
    """``x + gate * y`` of ``[B, S, C]``; the memory of ``y`` is used up."""
    return _add(x, gate, pieces, None, 0.0)[0]


def gated_add_and_norm(x: Tensor, gate: Table, pieces: Pieces, table: Table, eps: float) -> tuple[Tensor, Tensor]:
    """`gated_add`, and `modulated_norm` of its result."""
    total, normed = _add(x, gate, pieces, table, eps)
    assert normed is not None
    return total, normed


def _add(x: Tensor, gate: Table, pieces: Pieces, table: Table | None, eps: float) -> tuple[Tensor, Tensor | None]:
    if not has_kernels(x) or torch.compiler.is_compiling():
        terms = [pieces.summands(number) for number in range(len(pieces.tensors))]
        parts = [term[0] if len(term) == 1 else term[0] + term[1] for term in terms]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=pieces.dim)
        added = (x + _of_tokens(gate.gate, gate.picks) * y).to(x.dtype)
        return added, None if table is None else _plain_norm(added, table, eps)
    whole = len(pieces.tensors) == 1
    total: Tensor | None = None if whole else torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = None if table is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    first = 0
    for number in range(len(pieces.tensors)):
        y, *others = pieces.summands(number)
        if total is None:
            total = y  # what a block is given is not its own to write to, as a cache may hold it
        size = y.shape[pieces.dim]

        def part(full: Tensor, first: int = first, size: int = size) -> Tensor:
            return full if whole else full.narrow(pieces.dim, first, size)

        rows, index = slice(None), gate.picks
        if pieces.dim == 0 and not whole:
            assert index is None, "batches of tokens with tables of their own are not in pieces"
            rows = slice(first, first + size)
        index = None if index is None else part(index)
        triton_kernels.add_norm(
            part(x), y, others[0] if others else None, gate.gate[rows], part(total),
            None if table is None else table.shift[rows], None if table is None else table.scale[rows],
            None if normed is None else part(normed), eps, index,
        )  # fmt: skip
        first += size
    assert total is not None
    return total, normed


def swiglu(x: Tensor) -> Tensor:
    """``silu`` of the first half of the features, times the second half: ``[..., 2 F] -> [..., F]``."""
    gate, up = x.chunk(2, dim=-1)
    if not has_kernels(x) or torch.compiler.is_compiling() or not x.is_contiguous():
        return F.silu(gate) * up
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    triton_kernels.swiglu(x, out)
    return out


def swiglu_in_place(x: Tensor) -> Tensor:
    """`swiglu` of contiguous ``[..., 2 F]``, in the memory of its first half."""
    gate, up = x.chunk(2, dim=-1)
    if has_kernels(x):
        triton_kernels.swiglu(x, gate)
        return gate
    return F.silu(gate, inplace=True).mul_(up)


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh."""
    return F.gelu(x, approximate="tanh")


def gelu_in_place(x: Tensor) -> Tensor:
    """`gelu`, in the memory of its input."""
    return torch.ops.aten.gelu_(x, approximate="tanh")


def pack(
    streams: Sequence[HeadInputs],
    cos: Tensor,
    sin: Tensor,
    parts: int,
    *,
    apart: bool = False,
    factors: Tensor | None = None,
) -> list[Tensor]:
    """Queries, keys and values of all tokens, normed and rotated, laid out for an exchange that spreads the heads.

    Args:
        streams: one after the other they make the rank's tokens.
        cos, sin: ``[S_local, D]``, fp32; neighbours are turned as a pair and have the same values.
        parts: how many ranks the heads go to.
        apart: keys and values in memory of their own.
        factors: where a token's heads are normed together, what its queries and its keys are multiplied by (one over
            the root of their mean square), fp32 ``[B, S_local, 2]``; None: each head is normed by itself.

    Returns:
        ``[parts * S_local, B, 3, H / parts, D]`` alone; or, apart (``parts`` is 1), ``[S_local, B, 1, H, D]`` and
        ``[S_local, B, 2, H, D]``.
    """
    first = streams[0].query
    batch, width, dim = first.shape[0], first.shape[2], cos.shape[-1]
    local = sum(stream.query.shape[1] for stream in streams)
    heads = width // dim // parts
    sizes = (1, 2) if apart else (3,)
    if not has_kernels(first) or dim & (dim - 1):
        x = torch.cat([_plain_heads(stream, cos, sin, at, factors) for stream, at in _with_starts(streams)], dim=1)
        x = x.view(batch, local, 3, parts, heads, dim).permute(3, 1, 0, 2, 4, 5)  # [parts, S_local, B, 3, h, D]
        return [part.contiguous().flatten(0, 1) for part in x.split(sizes, dim=3)]
    tensors = [tensor for stream in streams for tensor in stream[:5]]
    if torch.compiler.is_compiling():
        return torch.ops.hybrid_dit.pack(tensors, cos, sin, streams[0].eps, parts, apart, factors)
    return _pack_with_kernel(tensors, cos, sin, streams[0].eps, parts, apart, factors)


def turn(fused: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """What `pack` makes of one stream for one rank, in the memory of its queries, keys and values where it can.

    Args:
        fused: they lie side by side, ``[B, S, 3 * H * D]``, each token's together, and are used up.
        query_weight, key_weight, eps: of their norms.
        cos, sin: ``[S, D]``, fp32.

    Returns:
        ``[B, S, 3, H, D]``.
    """
    dim = query_weight.shape[0]
    if not has_kernels(fused) or dim & (dim - 1):
        query, key, value = fused.chunk(3, dim=-1)
        return _plain_heads(HeadInputs(query, key, value, query_weight, key_weight, eps), cos, sin, 0, None)
    run = torch.ops.hybrid_dit.turn if torch.compiler.is_compiling() else triton_kernels.turn
    run(fused, query_weight, key_weight, eps, cos, sin)
    return fused.unflatten(2, (3, -1, dim))


def _pack_with_kernel(
    tensors: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    parts: int,
    apart: bool,
    factors: Tensor | None,
) -> list[Tensor]:
    """`pack`; of each stream, one after the other, come the five tensors of its `HeadInputs`."""
    buffers = _pack_buffers(tensors, cos, sin, eps, parts, apart, factors)
    # [parts, S_local, B, n, h, D] -> [parts, S_local, B, h, D] of queries, keys and values
    places = [
        x[:, :, :, index]
        for buffer in buffers
        for x in [buffer.unflatten(0, (parts, -1))]
        for index in range(x.shape[3])
    ]
    at = 0
    for first in range(0, len(tensors), 5):
        query, key, value, query_weight, key_weight = tensors[first : first + 5]
        here = slice(at, at + query.shape[1])
        out = [place[:, here] for place in places]
        of = None if factors is None else factors[:, here]
        triton_kernels.pack(query, key, value, query_weight, key_weight, eps, cos[here], sin[here], out, of)
        at += query.shape[1]
    return buffers


def _pack_buffers(
    tensors: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    parts: int,
    apart: bool,
    factors: Tensor | None,
) -> list[Tensor]:
    """What `pack` returns, with nothing in it."""
    batch, _, width = tensors[0].shape
    dim = cos.shape[-1]
    local = sum(tensors[first].shape[1] for first in range(0, len(tensors), 5))
    sizes = (1, 2) if apart else (3,)
    return [tensors[0].new_empty(parts * local, batch, size, width // dim // parts, dim) for size in sizes]


# The compiler sees one operation: what it makes of a kernel of Triton's with dynamic sizes does not always work (2.11).
_library = torch.library.Library("hybrid_dit", "FRAGMENT")
_library.define("modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps, Tensor? picks) -> Tensor")
_library.impl("modulated_norm", _norm_with_kernel, "CUDA")
torch.library.register_fake("hybrid_dit::modulated_norm", lambda x, *_: x.new_empty(x.shape), lib=_library)
_library.define(
    "pack(Tensor[] streams, Tensor cos, Tensor sin, float eps, int parts, bool apart, Tensor? factors) -> Tensor[]"
)
_library.impl("pack", _pack_with_kernel, "CUDA")
torch.library.register_fake("hybrid_dit::pack", _pack_buffers, lib=_library)
_library.define(
    "turn(Tensor(a!) fused, Tensor query_weight, Tensor key_weight, float eps, Tensor cos, Tensor sin) -> ()"
)
if triton_kernels is not None:
    _library.impl("turn", triton_kernels.turn, "CUDA")
torch.library.register_fake("hybrid_dit::turn", lambda *_: None, lib=_library)


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join two partial results of attention ``[B, S, H, D]`` by their log-sum-exp ``[B, S, H, 1]``, in fp32.

    Returns:
        The result in ``dtype``, and its log-sum-exp.
    """
    dim = a.shape[-1]
    rows = all(x.stride(2) == dim and x.stride(3) == 1 for x in (a, b)) and all(
        lse.stride(1) == 1 for lse in (a_lse, b_lse)
    )
    if has_kernels(a) and not torch.compiler.is_compiling() and not dim & (dim - 1) and rows:
        return triton_kernels.merge(a, a_lse, b, b_lse, dtype)
    mine, theirs = a.float(), b.float()
    merged = mine - torch.sigmoid(b_lse - a_lse) * (mine - theirs)
    return merged.to(dtype), torch.logaddexp(a_lse, b_lse)


def change(after: Tensor, before: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """``after - before`` of ``[B, S, C]``, and two sums over it, in fp32 at least.

    Args:
        kept: what an earlier call returned.

    Returns:
        The difference, and ``[2]``: the L1 norm of it, and that of what it differs from ``kept`` by (0 without).
    """
    if has_kernels(after) and after.stride(2) == before.stride(2) == 1 and (kept is None or kept.is_contiguous()):
        return triton_kernels.change(after, before, kept)
    difference = after - before
    norm = _l1(difference)
    return difference, torch.stack([norm, torch.zeros_like(norm) if kept is None else _l1(kept - difference)])


def _l1(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, ord=1, dtype=torch.promote_types(x.dtype, torch.float32))


def _with_starts(streams: Sequence[HeadInputs]) -> list[tuple[HeadInputs, int]]:
    """Each stream, and how many tokens come before it."""
    found, at = [], 0
    for stream in streams:
        found.append((stream, at))
        at = at + stream.query.shape[1]
    return found


def _plain_heads(stream: HeadInputs, cos: Tensor, sin: Tensor, at: int, factors: Tensor | None) -> Tensor:
    """A stream's queries, keys and values ``[B, S, 3, H, D]``."""
    batch, tokens, width = stream.query.shape
    dim = cos.shape[-1]
    shape = (batch, tokens, width // dim, dim)
    here = slice(at, at + tokens)
    cos, sin = cos[here, None, ::2], sin[here, None, ::2]

    def turned(x: Tensor, weight: Tensor, index: int) -> Tensor:
        heads = x.reshape(shape)
        if factors is None:
            normed = F.rms_norm(heads, (dim,), weight.to(x.dtype), stream.eps).float()
        else:
            normed = heads.float() * factors[:, here, index, None, None] * weight.float().view(-1, dim)
        even, odd = normed[..., ::2], normed[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)

    query, key = turned(stream.query, stream.query_weight, 0), turned(stream.key, stream.key_weight, 1)
    return torch.stack((query, key, stream.value.reshape(shape)), dim=2)


def _of_tokens(values: Tensor, index: Tensor | None) -> Tensor:
    """What each token takes of ``[n * B, C]``: ``[B, 1, C]``, or ``[B, S, C]`` where an index ``[B, S]`` says so."""
    if index is None:
        return values[:, None]
    batch = index.shape[0]
    if values.shape[0] == 2 * batch:
        zero, one = values.unsqueeze(1).chunk(2)
        return torch.where(index[..., None] == 0, zero, one)
    return values[index * batch + torch.arange(batch, device=index.device)[:, None]]
