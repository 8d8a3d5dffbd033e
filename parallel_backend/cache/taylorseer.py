"""TaylorSeer (arXiv:2503.06923): forecasts what skipped blocks would add, from what they added when last computed."""

from __future__ import annotations

import math

from torch import Tensor


class Forecast:
    """Finite differences of the middle blocks' residual over the steps at which they were computed.

    Args:
        order: highest derivative; 0 repeats the last residual.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.derivatives: list[tuple[Tensor, ...]] = []
        self.position = 0.0

    def update(self, values: tuple[Tensor, ...], position: float) -> None:
        """Take the residual of each token stream, computed at ``position`` (in steps)."""
        window = position - self.position
        new = [values]
        if self.derivatives and abs(window) < 1e-6:
            # A second evaluation at the same place, as Heun's method makes it, says nothing about change.
            new += self.derivatives[1:]
        else:
            for level in range(min(self.order, len(self.derivatives))):
                previous = self.derivatives[level]
                new.append(tuple((a - b) / window for a, b in zip(new[level], previous, strict=True)))
        self.derivatives, self.position = new, position

    def growth_bytes(self) -> int:
        """Memory that the derivatives will take which are not there yet."""
        first = self.derivatives[0] if self.derivatives else ()
        return (self.order + 1 - len(self.derivatives)) * sum(values.nbytes for values in first)

    def at(self, position: float) -> tuple[Tensor, ...]:
        """The residual of each token stream at ``position``, forecast from the last `update`."""
        elapsed = position - self.position
        out = list(self.derivatives[0])
        for level, derivative in enumerate(self.derivatives[1:], start=1):
            factor = elapsed**level / math.factorial(level)
            out = [total.add(part, alpha=factor) for total, part in zip(out, derivative, strict=True)]
        return tuple(out)
