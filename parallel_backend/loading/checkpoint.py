"""A checkpoint: a diffusers pipeline folder, or a transformer in one file. Both answer the same questions."""

from __future__ import annotations

from pathlib import Path

from .pipeline_folder import PipelineFolder, open_pipeline_folder
from .single_file import SingleFile, open_single_file

Checkpoint = PipelineFolder | SingleFile


def open_checkpoint(path: Path) -> Checkpoint:
    """Look at a checkpoint; a few kilobytes of it are read.

    Raises:
        ValueError: it is not there, not whole, or not supported; says what and where.
    """
    return open_single_file(path) if Path(path).is_file() else open_pipeline_folder(path)
