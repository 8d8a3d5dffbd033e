"""A matrix product that is added to another in its own memory, in eager and in compiled code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("hybrid_dit", "FRAGMENT")


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y + x @ weight.T`` for ``y`` ``[B, S, out]``, which is used up, and ``x`` ``[B, S, in]``."""
    if torch.is_grad_enabled():
        return y + F.linear(x, weight)
    if torch.compiler.is_compiling():
        # The compiler would give the product memory of its own and add it in another pass.
        torch.ops.hybrid_dit.add_product(y, x, weight)
    else:
        _add_in_place(y, x, weight)
    return y


def _add_in_place(y: Tensor, x: Tensor, weight: Tensor) -> None:
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


_library.define("add_product(Tensor(a!) y, Tensor x, Tensor weight) -> ()")
for _device in ("CPU", "CUDA"):
    _library.impl("add_product", _add_in_place, _device)
torch.library.register_fake("hybrid_dit::add_product", lambda y, x, weight: None, lib=_library)
