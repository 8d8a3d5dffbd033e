"""How long is waited for ranks and for what they do, as far as users may say so."""

from __future__ import annotations

import os

STEP_VARIABLE, STEP_SECONDS = "HYBRID_DIT_STEP_DEADLINE", 60.0
"""The least that a step may take, and the most that a first one of its size may show no sign of getting on."""
MESH_VARIABLE, MESH_SECONDS = "HYBRID_DIT_MESH_DEADLINE", 30.0
"""The most that each of the tiny exchanges may take by which ranks find out whether they reach each other."""


def step_seconds() -> float:
    """The shortest deadline of a step; 0: none at all.

    Raises:
        ValueError: the variable holds no number of seconds.
    """
    return _seconds(STEP_VARIABLE, STEP_SECONDS, "a step counts as hung")


def mesh_seconds() -> float:
    """The deadline of an exchange when a mesh is built; 0: none at all.

    Raises:
        ValueError: the variable holds no number of seconds.
    """
    return _seconds(MESH_VARIABLE, MESH_SECONDS, "ranks count as out of each other's reach")


def _seconds(variable: str, default: float, what: str) -> float:
    text = os.environ.get(variable, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(
            f"{variable} is {text!r}; it takes seconds, such as {default:.0f}, after which {what} (0: never)"
        )
    return seconds
