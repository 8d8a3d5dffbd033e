"""An MLP over many tokens, a piece of them at a time, so that its wide middle is never there for all.

FLUX.2's middle is nine times as wide as its tokens. In pieces that are large enough (`PIECE`) it takes as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .elementwise import gelu_in_place, swiglu_in_place
from .products import Product, restored

PIECE = 2816
"""Tokens of a piece: with widths that are multiples of 3072, its products' tiles of 128 x 256 are whole waves on the
132 processors of an H100 or H200. Those of half of it are too, but take 2 % longer."""

_library = torch.library.Library("hybrid_dit", "FRAGMENT")


class Mlp(NamedTuple):
    """Weights of an MLP and their biases: with SwiGLU ``[2 F, C]``, gate before up, with GELU by tanh ``[F, C]``; and
    ``[C, F]``."""

    into: Product
    into_bias: Tensor | None
    out: Product
    out_bias: Tensor | None
    gelu: bool = False

    def repeated(self, dtype: torch.dtype) -> Mlp:
        """For many pieces: see `Product.repeated`."""
        return self._replace(into=self.into.repeated(dtype), out=self.out.repeated(dtype))


def is_long(x: Tensor) -> bool:
    """Whether ``[B, S, C]`` are so many tokens that their MLP should be in pieces; it knows nothing of gradients."""
    return not torch.is_grad_enabled() and x.shape[0] * x.shape[1] >= 2 * PIECE


def mlp_in_pieces(x: Tensor, mlp: Mlp) -> Tensor:
    """The output ``[B, S, C]`` for contiguous ``x`` ``[B, S, C]``."""
    if torch.compiler.is_compiling():
        return torch.ops.hybrid_dit.mlp_in_pieces(x, *_flat(mlp))
    y = torch.empty_like(x)
    _compute(x, y, 0, x.shape[0] * x.shape[1], PIECE, mlp)
    return y


def mlp_in_place(x: Tensor, first: int, end: int, piece: int, mlp: Mlp) -> None:
    """Put the output of some tokens in their place.

    Args:
        x: contiguous, ``[B, S, C]``.
        first, end: which, of the B * S.
        piece: how many at a time, about.
        mlp: weights.
    """
    if torch.compiler.is_compiling():
        torch.ops.hybrid_dit.mlp_in_place(x, first, end, piece, *_flat(mlp))
    else:
        _compute(x, x, first, end, piece, mlp)


def _flat(mlp: Mlp) -> tuple[Any, ...]:
    """As operators take it."""
    assert mlp.into.kind is not None
    assert mlp.out.kind is not None
    into, out = list(mlp.into.tensors()), list(mlp.out.tensors())
    return mlp.into.kind, into, mlp.into_bias, mlp.out.kind, out, mlp.out_bias, mlp.gelu


def _unflattened(
    into_kind: str, into: list[Tensor], into_bias: Tensor | None,
    out_kind: str, out: list[Tensor], out_bias: Tensor | None, gelu: bool,
) -> Mlp:  # fmt: skip
    return Mlp(restored(into_kind, into), into_bias, restored(out_kind, out), out_bias, gelu)


def _in_pieces(x: Tensor, *flat: Any) -> Tensor:
    return mlp_in_pieces(x, _unflattened(*flat))


def _in_place(x: Tensor, first: int, end: int, piece: int, *flat: Any) -> None:
    mlp_in_place(x, first, end, piece, _unflattened(*flat))


def _compute(x: Tensor, y: Tensor, first: int, end: int, piece: int, mlp: Mlp) -> None:
    x, y = (tensor.view(-1, tensor.shape[-1]) for tensor in (x, y))
    for a, b in _pieces(first, end, piece):
        hidden = mlp.into.product(x[a:b], mlp.into_bias)
        hidden = gelu_in_place(hidden) if mlp.gelu else swiglu_in_place(hidden)
        mlp.out.product_in(y[a:b], hidden, mlp.out_bias)
        del hidden  # before the next is made


def _pieces(first: int, end: int, piece: int) -> Iterator[tuple[int, int]]:
    """Ranges of about ``piece`` each; the last takes, or is, what is left, half a piece at least if there is more."""
    while end - first >= piece + piece // 2:
        yield first, first + piece
        first += piece
    if first < end:
        yield first, end


_MLP = "str into_kind, Tensor[] into, Tensor? into_bias, str out_kind, Tensor[] out, Tensor? out_bias, bool gelu"
_library.define(f"mlp_in_pieces(Tensor x, {_MLP}) -> Tensor")
_library.define(f"mlp_in_place(Tensor(a!) x, SymInt first, SymInt end, SymInt piece, {_MLP}) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("mlp_in_pieces", _in_pieces, _device)
    _library.impl("mlp_in_place", _in_place, _device)
torch.library.register_fake("hybrid_dit::mlp_in_pieces", lambda x, *_: torch.empty_like(x), lib=_library)
torch.library.register_fake("hybrid_dit::mlp_in_place", lambda *_: None, lib=_library)
