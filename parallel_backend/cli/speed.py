"""The arguments of all commands that say how a model's blocks run."""

from __future__ import annotations

import argparse

from ..config import Speed


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--compile``, ``--cuda-graphs`` and ``--copy-engines``."""
    parser.add_argument("--compile", action="store_true", help="compile the blocks, which takes a minute or so")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="run all blocks of a step as one CUDA graph, for small models"
    )
    parser.add_argument(
        "--copy-engines", action="store_true", help="exchange by the GPUs' copy engines where they reach each other"
    )


def speed_of(arguments: argparse.Namespace) -> Speed:
    """What the arguments ask for."""
    return Speed(arguments.compile, arguments.cuda_graphs, arguments.copy_engines)
