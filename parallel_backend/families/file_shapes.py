"""What families read off the shapes of a file's tensors, with errors that name what is missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_BLOCKS = 1000
"""Blocks or layers of a model, of which each is built before anything is found to be missing."""


def shape_of(shapes: Mapping[str, tuple[int, ...]], key: str, dims: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that has to be there, with so many dims, none of them empty.

    Raises:
        ValueError: it is missing, or of another kind.
    """
    found = shapes.get(key)
    if found is None:
        raise ValueError(f"there is no tensor {key}; the file is incomplete")
    if len(found) != dims or 0 in found:
        raise ValueError(f"{key} has shape {list(found)}, where {dims} dims are expected; the file is damaged")
    return found


def count_blocks(shapes: Mapping[str, Any], blocks: str) -> int:
    """How many blocks there are, from keys such as ``{blocks}.0.``.

    Raises:
        ValueError: one in between is missing.
    """
    found = {int(match[1]) for key in shapes if (match := re.match(rf"{re.escape(blocks)}\.(\d{{1,9}})\.", key))}
    if len(found) > MAX_BLOCKS:
        raise ValueError(f"there are {len(found)} {blocks}, more than any model has; the file is damaged")
    missing = set(range(len(found))) - found
    if missing:
        raise ValueError(f"there are no tensors of {blocks}.{min(missing)}; the file is incomplete")
    return len(found)
