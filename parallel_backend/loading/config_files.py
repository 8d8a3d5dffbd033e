"""JSON in checkpoints: read within bounds, and blamed for what the classes that are made of it cannot cope with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..families.file_shapes import MAX_BLOCKS

MAX_BYTES = 32 << 20
"""Of JSON that is read: a hundred times what the largest models have. Parsed, it takes some ten times as much."""
MAX_DEPTH = 20
MAX_SIZE = 1 << 24
"""Of any other whole number but a base of positions: models' tables, of which a few are real, grow with those."""


def parse_object(text: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is something else, or names something twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it is a {type(content).__name__}, not an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it names something twice")
    return content


def read_object(file: Path, meaning: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: which.
        meaning: what it means that it is missing, for the message.

    Raises:
        ValueError: it is missing, cannot be read, or holds something else; names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing: {meaning}")
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return parse_object(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON ({str(error)[:300]}); download it again") from None


def read_config(file: Path, meaning: str) -> dict[str, Any]:
    """A model's configuration, with no number in it that no model has.

    Raises:
        ValueError: as `read_object`, or a number is out of bounds; names both.
    """
    config = read_object(file, meaning)
    try:
        _check_numbers(config, "", MAX_DEPTH)
    except ValueError as error:
        raise ValueError(f"{file} is no model's configuration: {str(error)[:300]}") from None
    return config


def _check_numbers(value: Any, name: str, levels: int) -> None:
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError("it is nested too deeply")
        if isinstance(value, list) and len(value) > MAX_BLOCKS:
            raise ValueError(f"{name} has {len(value)} entries, of at most {MAX_BLOCKS}")
        for key, inner in value.items() if isinstance(value, dict) else ((name, inner) for inner in value):
            _check_numbers(inner, key, levels - 1)
    elif isinstance(value, int) and "theta" not in name:
        most = MAX_BLOCKS if any(word in name for word in ("layers", "blocks", "depth")) else MAX_SIZE
        if abs(value) > most:
            raise ValueError(f"{name}={value}, of at most {most}")


@contextmanager
def blamed(file: Path) -> Iterator[None]:
    """What goes wrong inside is the fault of a file that others' classes are made of: a ValueError that names it."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text[:1000] if str(file) in text else f"{file}: {text[:1000]}") from None
    except MemoryError:
        raise
    except Exception as error:  # a class raises what it likes at a configuration that it does not expect
        raise ValueError(f"no model can be made of {file} ({repr(error)[:300]}); download it again") from error
