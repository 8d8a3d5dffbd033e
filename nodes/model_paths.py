"""What ComfyUI's model folders hold: files and pipeline folders, by the names that its lists show."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import folder_paths

from ..parallel_backend.drawing.demo_model import DEMO_FOLDER_NAME, demo_folder, demo_loras
from ..parallel_backend.loading.model_folders import files_below, is_pipeline, pipelines_in

log = logging.getLogger(__name__)

MODEL_FILES, ENCODER_FILES, CHECKPOINT_FILES, VAE_FILES = "diffusion_models", "text_encoders", "checkpoints", "vae"
"""ComfyUI's names of folders with files; models/unet is among the first, models/clip among the second."""


def file_names(kind: str) -> list[str]:
    """Names of the files in one of ComfyUI's kinds of folders, as its own loaders list them."""
    try:
        return folder_paths.get_filename_list(kind)
    except OSError as error:
        # One folder that may not be looked into; without a list, none of the pack's nodes would be there.
        log.warning("ComfyUI cannot list its %s (%s); folders that cannot be read are left out", kind, error)
    roots = map(Path, folder_paths.get_folder_paths(kind))
    names = {str(file.relative_to(root)) for root in roots for file in files_below(root)}
    return folder_paths.filter_files_extensions(names, folder_paths.supported_pt_extensions)


def find_file(kind: str, name: str) -> Path:
    """The file of a listed name, of one of ComfyUI's kinds of folders.

    Raises:
        ValueError: there is no such file in them.
    """
    found = folder_paths.get_full_path(kind, name) if name in file_names(kind) else None
    if found is None:
        roots = ", ".join(map(str, folder_paths.get_folder_paths(kind)))
        raise ValueError(f"there is no file {name!r} under {roots}, or it is a link that leads nowhere")
    return Path(os.path.abspath(found))


def offer_demo_loras() -> None:
    """Have ComfyUI's LoRA loaders list those of the demo, behind its user's own."""
    folder_paths.add_model_folder_path("loras", str(demo_loras()))


def list_pipelines() -> list[str]:
    """Names of the pipeline folders that ComfyUI's model paths hold, and of the demo."""
    names = {name for root in _pipeline_roots() for name in pipelines_in(root)}
    return sorted(names | {DEMO_FOLDER_NAME})


def find_pipeline(name: str) -> Path:
    """The folder of a listed name.

    Raises:
        ValueError: there is no such folder under models/diffusers.
    """
    # A name, not a path: nothing outside of the model folders can be reached.
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not the name of a pipeline folder")
    roots = _pipeline_roots()
    for root in roots:
        if is_pipeline(root / name):
            return root / name
    for root in roots:
        if found := pipelines_in(root).get(name):
            return found
    if name == DEMO_FOLDER_NAME:
        return demo_folder()
    for root in roots:
        if os.path.isdir(root / name):
            return root / name  # opened, it says what is missing
    raise ValueError(f"there is no pipeline folder {name!r} under {', '.join(map(str, roots))}")


def _pipeline_roots() -> list[Path]:
    """Where ComfyUI has pipeline folders; other packs and extra_model_paths.yaml may have named some."""
    return [Path(os.path.abspath(root)) for root in folder_paths.get_folder_paths("diffusers")]
