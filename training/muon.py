"""Muon (Jordan et al., 2024) for the matrices of transformer blocks, batched over all matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1, by five Newton-Schulz steps; ``[N, rows, columns]``."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalized. torch's own Muon goes matrix by matrix, which costs more than a step of the model.

    Args:
        pieces: the parameters and, for each, how many rows each matrix that was fused into it has.
        momentum: of the gradients.
        weight_decay: as AdamW's.
    """

    def __init__(
        self, pieces: Sequence[tuple[Tensor, Sequence[int]]], momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        for parameter, rows in pieces:
            start = 0
            for count in rows:
                self.groups.setdefault((count, parameter.shape[1]), []).append((parameter, start))
                start += count
        self.moments = {
            shape: torch.zeros(len(members), *shape, device=members[0][0].device)
            for shape, members in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """One step; ``rate`` lies on the device, so that a CUDA graph of the step can follow it."""
        for (rows, columns), members in self.groups.items():
            gradient = torch.stack([p.grad[start : start + rows] for p, start in members if p.grad is not None])
            moment = self.moments[rows, columns]
            moment.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp_(moment, self.momentum)).float()
            # Steps as large as AdamW's, so that one rate fits both.
            update *= -rate * 0.2 * max(rows, columns) ** 0.5
            views = [p[start : start + rows] for p, start in members]
            torch._foreach_mul_(views, 1 - rate * self.weight_decay)
            torch._foreach_add_(views, list(update.unbind()))
