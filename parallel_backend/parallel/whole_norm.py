"""RMSNorm over the features of all heads, which tensor parallelism spreads over ranks: each has a part of the sum.

What ranks tell each other is a number a token and norm, in fp32, while the next product runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..mesh import Axis
from . import exchange


def begin_sums(axis: Axis, *parts: Tensor) -> Tensor | exchange.InFlight:
    """Start to sum the squares of a token's features over an axis.

    Args:
        axis: that the features are spread over.
        parts: ``[B, S, n_local]`` each.

    Returns:
        ``[B, S, len(parts)]`` in fp32 at least, which may be in flight.
    """
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=dtype) for part in parts]  # without a copy in that dtype
    sums = torch.stack(norms, dim=-1).square()
    return exchange.all_reduce(sums, axis) if axis.is_split else sums


def factors(sums: Tensor | exchange.InFlight, features: int, eps: float) -> Tensor:
    """What a token's features are multiplied by: one over the root of their mean square.

    Args:
        sums: of `begin_sums`.
        features: on all ranks of the axis.
        eps: of the norm.
    """
    total = exchange.arrived(sums) if isinstance(sums, exchange.InFlight) else sums
    return torch.rsqrt(total / features + eps)
