"""A checkpoint: a diffusers pipeline folder, or a model in one file. All of them answer the same questions."""

from __future__ import annotations

import os
from pathlib import Path

from ..families import family_of_text_file
from .pipeline_folder import PipelineFolder, open_pipeline_folder
from .safetensors_reader import read_header
from .single_file import SingleFile, check_suffix, open_single_file
from .text_encoder_file import TextEncoderFile, open_text_encoder_file
from .vae_file import VaeFile, open_vae_file

Checkpoint = PipelineFolder | SingleFile | TextEncoderFile | VaeFile


def imports_of(source: Checkpoint) -> list[str]:
    """Modules that whoever builds and runs the model of a checkpoint is going to import."""
    return [module for component in source.components for module in source.family.imports(component)]


def open_checkpoint(path: Path) -> Checkpoint:
    """Look at a checkpoint; a few kilobytes of it are read.

    Raises:
        ValueError: it is not there, not whole, or not supported; says what and where.
    """
    path = Path(path)
    if not os.path.isfile(path):
        return open_pipeline_folder(path)
    check_suffix(path)
    if family_of_text_file(read_header(path)):
        return open_text_encoder_file(path)
    return open_vae_file(path) or open_single_file(path)
