"""Step masks (SCM of cache-dit): which steps of a run are computed whatever the residuals say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise, zip_longest
from math import floor

POLICIES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
"""Lengths of stretches that are computed, and of those between them that may be cached, in a run of 28 steps."""


def steps_mask(policy: str, total_steps: int) -> tuple[int, ...]:
    """The mask of a policy for a run: 1 for a step to compute, 0 for one that may be cached.

    At 28 steps these are cache-dit's masks. For other lengths the computed steps keep their share of each part of the
    run; the first and the last step are always computed.

    Args:
        policy: a key of `POLICIES`.
        total_steps: steps of the run.

    Raises:
        ValueError: an unknown policy or a number of steps below 1.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown step mask {policy!r}; known are {', '.join(POLICIES)}")
    if total_steps < 1:
        raise ValueError(f"a step mask needs at least 1 step; got {total_steps}")
    compute, cache = POLICIES[policy]
    stretches = [n for n in chain.from_iterable(zip_longest(compute, cache)) if n is not None]
    mask = [step for index, n in enumerate(stretches) for step in [1 - index % 2] * n]
    # How many steps are computed up to each place, at the scale of this run; a step is computed where that grows.
    scale = total_steps / len(mask)
    computed = [0, *accumulate(mask)]
    grown = [floor(scale * _interpolate(computed, step / scale) + 0.5) for step in range(total_steps + 1)]
    scaled = [int(after > before) for before, after in pairwise(grown)]
    scaled[0] = scaled[-1] = 1
    return tuple(scaled)


def _interpolate(values: Sequence[int], place: float) -> float:
    """A line through ``values``, which stand at 0, 1, 2 and so on, at ``place``."""
    index = min(int(place + 1e-9), len(values) - 2)
    return values[index] + (place - index) * (values[index + 1] - values[index])


def parse_mask(text: str) -> str | tuple[int, ...] | None:
    """A mask as people write it: the name of a policy, ones and zeros in any grouping, or nothing.

    Raises:
        ValueError: something else.
    """
    text = text.strip()
    if not text or text in ("off", "none"):
        return None
    if text in POLICIES:
        return text
    digits = [c for c in text if c not in " ,;[]()"]
    if any(digit not in "01" for digit in digits):
        raise ValueError(
            f"a step mask is one of {', '.join(POLICIES)} or ones and zeros such as 1111 0 11 00 1; got {text!r}"
        )
    return tuple(int(digit) for digit in digits)


def leading_ones(mask: Sequence[int]) -> int:
    """Steps that a mask computes before it first allows a cached one."""
    return next((index for index, value in enumerate(mask) if not value), len(mask))
