"""``demo``: `generate` with a small model that comes along, and with what suits it."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "--model", type=Path, help="a diffusers pipeline folder (default: the small FLUX.2 that comes along)"
    )
    generate.add_common_arguments(
        parser,
        prompt="a large red circle left of a large blue star on a grey background",
        width=256,
        height=256,
        steps=8,
        seed=2,
        ulysses=2,
        tp=2,
        out=Path("demo.png"),
        report=Path("demo.json"),
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture; exit status 0."""
    return generate.run(arguments)
