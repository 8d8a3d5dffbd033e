"""Elementwise work of a block in one pass over memory each, in fp32 inside; `elementwise` says what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm_kernel(
    x, y, z, gate, total, shift, scale, out, index,
    tokens, batch, width, eps,
    x_batch, x_token, y_batch, y_token, z_batch, z_token,
    total_batch, total_token, out_batch, out_token,
    gate_row, shift_row, index_batch, index_token,
    ADD: tl.constexpr, ADD_TWO: tl.constexpr, NORM: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    table = b
    if INDEX:
        table = b + batch * tl.load(index + b * index_batch + s * index_token).to(tl.int64)
    value = tl.load(x + b * x_batch + s * x_token + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + b * y_batch + s * y_token + columns, mask=inside, other=0.0).to(tl.float32)
        if ADD_TWO:
            added += tl.load(z + b * z_batch + s * z_token + columns, mask=inside, other=0.0).to(tl.float32)
        by = tl.load(gate + table * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
        value += by * added
        tl.store(total + b * total_batch + s * total_token + columns, value, mask=inside)
    if NORM:
        mean = tl.sum(value, axis=0) / width
        centred = tl.where(inside, value - mean, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
        times = tl.load(scale + table * shift_row + columns, mask=inside, other=0.0).to(tl.float32)
        plus = tl.load(shift + table * shift_row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + b * out_batch + s * out_token + columns, centred * factor * (1.0 + times) + plus, mask=inside)


@triton.jit
def _swiglu_kernel(x, out, x_row, out_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * x_row + columns, mask=inside).to(tl.float32)
    up = tl.load(x + row * x_row + width + columns, mask=inside).to(tl.float32)
    tl.store(out + row * out_row + columns, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _widen_kernel(x, out, factor, x_row, out_row, factor_row, width, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_row + columns, mask=inside).to(tl.float32)
    if FACTOR:
        value *= tl.load(factor + row * factor_row).to(tl.float32)
    tl.store(out + row * out_row + columns, value, mask=inside)


@triton.jit
def _narrow_kernel(x, out, factor, x_row, out_row, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    stored = tl.load(x + row * x_row + columns, mask=inside, other=0.0)
    # Rounded before it is cut off, as by PyTorch.
    value = (stored.to(tl.float32) * tl.load(factor).to(tl.float32)).to(stored.dtype).to(tl.float32)
    value = tl.clamp(value, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * out_row + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_heads(
    x, out, weight, cos, sin, factor, heads, local_heads, part_stride, eps, first,
    TOGETHER: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = first + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    inside = (head < heads)[:, None]
    value = tl.load(x + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    if TOGETHER:
        of_heads = tl.load(weight + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0).to(tl.float32)
        value = value * tl.load(factor) * of_heads
    else:
        by = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / DIM + eps)
        value = value * by[:, None] * tl.load(weight + dims).to(tl.float32)[None, :]
    # Positions turn pairs of neighbours; cosines and sines come twice each.
    even, odd = tl.split(tl.reshape(value, [BLOCK, DIM // 2, 2]))
    c, _ = tl.split(tl.reshape(tl.load(cos + dims), [DIM // 2, 2]))
    s, _ = tl.split(tl.reshape(tl.load(sin + dims), [DIM // 2, 2]))
    c, s = c[None, :], s[None, :]
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), [BLOCK, DIM])
    place = (head // local_heads) * part_stride + (head % local_heads) * DIM
    tl.store(out + place[:, None] + dims[None, :], turned, mask=inside)


@triton.jit
def _copy_heads(x, out, heads, local_heads, part_stride, first, DIM: tl.constexpr, BLOCK: tl.constexpr):
    head = first + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    inside = (head < heads)[:, None]
    place = (head // local_heads) * part_stride + (head % local_heads) * DIM
    value = tl.load(x + head[:, None] * DIM + dims[None, :], mask=inside)
    tl.store(out + place[:, None] + dims[None, :], value, mask=inside)


@triton.jit
def _pack_kernel(
    q, k, v, q_out, k_out, v_out, q_weight, k_weight, cos, sin, factors,
    tokens, heads, local_heads, eps,
    q_batch, q_token, k_batch, k_token, v_batch, v_token,
    q_part, q_row, q_lane, kv_part, kv_row, kv_lane, factor_batch, factor_token,
    TOGETHER: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // tokens, row % tokens
    first = tl.program_id(1) * BLOCK
    which = tl.program_id(2)
    cos += s * DIM
    sin += s * DIM
    factor = factors + b * factor_batch + s * factor_token
    if which == 0:
        _rotate_heads(
            q + b * q_batch + s * q_token, q_out + s * q_row + b * q_lane, q_weight, cos, sin, factor,
            heads, local_heads, q_part, eps, first, TOGETHER, DIM, BLOCK,
        )  # fmt: skip
    elif which == 1:
        _rotate_heads(
            k + b * k_batch + s * k_token, k_out + s * kv_row + b * kv_lane, k_weight, cos, sin, factor + 1,
            heads, local_heads, kv_part, eps, first, TOGETHER, DIM, BLOCK,
        )  # fmt: skip
    else:
        _copy_heads(
            v + b * v_batch + s * v_token, v_out + s * kv_row + b * kv_lane,
            heads, local_heads, kv_part, first, DIM, BLOCK,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    a, a_lse, b, b_lse, out, out_lse, queries, heads,
    a_batch, a_query, a_lse_batch, a_lse_head, b_batch, b_query, b_lse_batch, b_lse_head,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, query = row // queries, row % queries
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    inside = head < heads
    at = head[:, None] * DIM + dims[None, :]
    first = tl.load(a_lse + batch * a_lse_batch + head * a_lse_head + query, mask=inside, other=0.0)
    second = tl.load(b_lse + batch * b_lse_batch + head * b_lse_head + query, mask=inside, other=0.0)
    mine = tl.load(a + batch * a_batch + query * a_query + at, mask=inside[:, None], other=0.0).to(tl.float32)
    theirs = tl.load(b + batch * b_batch + query * b_query + at, mask=inside[:, None], other=0.0).to(tl.float32)
    merged = mine - tl.sigmoid(second - first)[:, None] * (mine - theirs)
    tl.store(out + row * heads * DIM + at, merged, mask=inside[:, None])
    larger = tl.maximum(first, second)
    lse = larger + tl.log(1.0 + tl.exp(tl.minimum(first, second) - larger))
    tl.store(out_lse + batch * heads * queries + head * queries + query, lse, mask=inside)


@triton.jit
def _change_kernel(
    after, before, kept, out, sums, tokens, width,
    after_batch, after_token, before_batch, before_token,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, s = row // tokens, row % tokens
    norm = tl.zeros([BLOCK], tl.float32)
    change = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        to = tl.load(after + b * after_batch + s * after_token + columns, mask=inside, other=0.0).to(tl.float32)
        since = tl.load(before + b * before_batch + s * before_token + columns, mask=inside, other=0.0).to(tl.float32)
        # What is kept, and compared the next time, is the rounded difference.
        residual = (to - since).to(out.dtype.element_ty)
        tl.store(out + row * width + columns, residual, mask=inside)
        value = residual.to(tl.float32)
        norm += tl.abs(value)
        if KEPT:
            was = tl.load(kept + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            change += tl.abs(was - value)
    tl.store(sums + 2 * row, tl.sum(norm, axis=0))
    tl.store(sums + 2 * row + 1, tl.sum(change, axis=0))


def add_norm(
    x: Tensor, y: Tensor | None, z: Tensor | None, gate: Tensor | None, total: Tensor | None,
    shift: Tensor | None, scale: Tensor | None, out: Tensor | None, eps: float, index: Tensor | None,
) -> None:  # fmt: skip
    """``total = x + gate * (y + z)`` if there is ``y``, ``out = norm(that) * (1 + scale) + shift`` if there is ``out``.

    There may be no ``z``. ``x``, ``y``, ``z``, ``total`` and ``out`` are ``[B, S, C]`` with contiguous rows; the tables
    ``[n * B, C]`` too; ``index`` ``[B, S]`` says which of the n a token takes.
    """
    batch, tokens, width = x.shape
    if not x.numel():
        return
    y_, z_, gate_, total_, shift_, scale_, out_ = (
        x if t is None else t for t in (y, z, gate, total, shift, scale, out)
    )
    block = triton.next_power_of_2(width)
    _add_norm_kernel[(batch * tokens,)](
        x, y_, z_, gate_, total_, shift_, scale_, out_, x if index is None else index,
        tokens, batch, width, eps,
        x.stride(0), x.stride(1), y_.stride(0), y_.stride(1), z_.stride(0), z_.stride(1),
        total_.stride(0), total_.stride(1), out_.stride(0), out_.stride(1), gate_.stride(0), shift_.stride(0),
        0 if index is None else index.stride(0), 0 if index is None else index.stride(1),
        ADD=y is not None, ADD_TWO=z is not None, NORM=out is not None, INDEX=index is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip


def swiglu(x: Tensor, out: Tensor) -> None:
    """``out = silu(x[..., :F]) * x[..., F:]`` of rows ``[..., 2 F]`` that lie evenly in memory, as those of ``out`` do.

    ``out`` may be the first half of ``x``.
    """
    width = x.shape[-1] // 2
    rows = out.numel() // width
    if rows:
        block = min(2048, triton.next_power_of_2(width))
        grid = (rows, triton.cdiv(width, block))
        _swiglu_kernel[grid](x, out, x.stride(-2), out.stride(-2), width, BLOCK=block, num_warps=4)


def widen(x: Tensor, out: Tensor, factor: Tensor | None) -> None:
    """``out = x * factor`` of ``[rows, columns]``: rounded once. The factor is a scalar, one for each row, or None."""
    rows, width = x.shape
    block = min(4096, triton.next_power_of_2(width))
    _widen_kernel[(rows, triton.cdiv(width, block))](
        x, out, factor, x.stride(0), out.stride(0), 0 if factor is None or factor.numel() == 1 else 1, width,
        FACTOR=factor is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip


def narrow(x: Tensor, out: Tensor, factor: Tensor, limit: float) -> None:
    """``out = (x * factor)``, rounded to the dtype of ``x``, cut off at ``limit`` and rounded to that of ``out``."""
    rows, width = x.shape
    block = min(4096, triton.next_power_of_2(width))
    _narrow_kernel[(rows, triton.cdiv(width, block))](
        x, out, factor, x.stride(0), out.stride(0), width, LIMIT=limit, BLOCK=block, num_warps=8
    )


def pack(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
    out: Sequence[Tensor], factors: Tensor | None,
) -> None:  # fmt: skip
    """Norm and rotate queries and keys, and copy values, ``[B, S, H * D]`` each, to where an exchange takes them from.

    ``out`` is of q, k and v ``[parts, S, B, H / parts, D]`` with contiguous heads; k's and v's strides are the same.
    ``factors`` are those of `elementwise.pack`, ``[B, S, 2]`` with contiguous pairs; with them weights are ``[H * D]``.
    """
    batch, tokens, _ = q.shape
    q_out, k_out, v_out = out
    parts, _, _, local_heads, dim = q_out.shape
    heads = parts * local_heads
    if not q.numel():
        return
    block = _heads_of_a_program(heads)
    _pack_kernel[(batch * tokens, triton.cdiv(heads, block), 3)](
        q, k, v, q_out, k_out, v_out, q_weight, k_weight, cos, sin, cos if factors is None else factors,
        tokens, heads, local_heads, eps,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        q_out.stride(0), q_out.stride(1), q_out.stride(2), k_out.stride(0), k_out.stride(1), k_out.stride(2),
        0 if factors is None else factors.stride(0), 0 if factors is None else factors.stride(1),
        TOGETHER=factors is not None, DIM=dim, BLOCK=block, num_warps=2,
    )  # fmt: skip


def turn(fused: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> None:
    """Norm and rotate, in place, queries and keys of ``[B, S, 3 * H * D]`` with contiguous rows; values come last."""
    batch, tokens, width = fused.shape
    dim = q_weight.shape[0]
    heads = width // 3 // dim
    if not fused.numel():
        return
    q, k, v = fused.chunk(3, dim=-1)
    block, rows = _heads_of_a_program(heads), (fused.stride(0), fused.stride(1))
    _pack_kernel[(batch * tokens, triton.cdiv(heads, block), 2)](
        q, k, v, q, k, v, q_weight, k_weight, cos, sin, cos,
        tokens, heads, heads, eps, *rows, *rows, *rows,
        0, rows[1], rows[0], 0, rows[1], rows[0], 0, 0, TOGETHER=False, DIM=dim, BLOCK=block, num_warps=2,
    )  # fmt: skip


def _heads_of_a_program(heads: int) -> int:
    return 16 if heads % 16 == 0 else min(8, triton.next_power_of_2(heads))


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join two partial results of attention ``[B, S, H, D]`` by their lse ``[B, S, H, 1]``, contiguous along S."""
    batch, queries, heads, dim = a.shape
    out = torch.empty(batch, queries, heads, dim, dtype=dtype, device=a.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=a.device)
    block = min(16, triton.next_power_of_2(heads))
    _merge_kernel[(batch * queries, triton.cdiv(heads, block))](
        a, a_lse, b, b_lse, out, lse, queries, heads,
        a.stride(0), a.stride(1), a_lse.stride(0), a_lse.stride(2), b.stride(0), b.stride(1),
        b_lse.stride(0), b_lse.stride(2), DIM=dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out, lse.transpose(1, 2).unsqueeze(-1)


def change(after: Tensor, before: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """``after - before`` ``[B, S, C]``, contiguous, and the L1 norms ``[2]`` of it and of its distance to ``kept``.

    Rows of ``after`` and ``before`` are contiguous; ``kept`` is what an earlier call returned. Without it the second
    norm is 0. They are in fp32, added up in the same order in each call.
    """
    batch, tokens, width = after.shape
    out = torch.empty(after.shape, dtype=after.dtype, device=after.device)
    sums = torch.empty(batch * tokens, 2, dtype=torch.float32, device=after.device)
    if after.numel():
        block = min(2048, triton.next_power_of_2(width))
        _change_kernel[(batch * tokens,)](
            after, before, out if kept is None else kept, out, sums, tokens, width,
            after.stride(0), after.stride(1), before.stride(0), before.stride(1),
            KEPT=kept is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out, sums.sum(0)
