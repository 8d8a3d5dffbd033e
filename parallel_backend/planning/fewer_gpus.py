"""Whether fewer of some GPUs would be faster: exchanges over slow links may take longer than what they save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..machine import Machine
from .gpu_speed import link_between

C = TypeVar("C")


def subsets(machine: Machine, gpus: Sequence[int], largest: int) -> Iterator[list[int]]:
    """Some of a machine's GPUs, in the order that they are given in, from ``largest`` at a time down to one.

    Of each size there is, for each GPU, that one with those that it has the best links to: so GPUs that a bridge or a
    switch joins are found together.

    Args:
        machine: where they are.
        gpus: their numbers.
        largest: how many at most.
    """
    near = [
        sorted(range(len(gpus)), key=lambda b: (b != a, -link_between(machine, gpus[a], gpus[b]).gb_per_s))
        for a in range(len(gpus))
    ]
    for size in range(largest, 0, -1):
        for chosen in dict.fromkeys(tuple(sorted(order[:size])) for order in near):
            yield [gpus[place] for place in chosen]


def fastest(
    machine: Machine, gpus: Sequence[int], choose: Callable[[Sequence[int]], C], ms: Callable[[C], float]
) -> tuple[list[int], C, C | None]:
    """The choice for as many of some GPUs as is fastest, and that for all of them where it is another.

    More GPUs are taken where fewer are as fast.

    Args:
        machine: where they are.
        gpus: their numbers.
        choose: for some of them; ValueError where nothing fits.
        ms: what a step takes with a choice.

    Returns:
        Which GPUs, the choice for them, and the choice for all: None where that is it, or nothing fits all.

    Raises:
        ValueError: nothing fits; of all of them.
    """
    best: tuple[list[int], C] | None = None
    error: ValueError | None = None
    everything: C | None = None
    try:
        everything = choose(gpus)
        best = list(gpus), everything
    except ValueError as found:
        error = found
    for some in subsets(machine, gpus, len(gpus) - 1):
        with contextlib.suppress(ValueError):
            choice = choose(some)
            if best is None or ms(choice) < ms(best[1]):
                best = some, choice
    if best is None:
        assert error is not None
        raise error
    return best[0], best[1], None if best[1] is everything else everything
