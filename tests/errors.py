"""How far a tensor is from the one that was expected."""

import math

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected, which has to be a number: NaN is neither near nor far."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = ((actual - expected).norm() / expected.norm()).item()
    assert math.isfinite(error), error
    return error
