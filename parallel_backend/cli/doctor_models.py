"""What the doctor looks at in ComfyUI's model folders: entries that no loader can use, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..loading.model_folders import check_name, pipelines_in

KINDS = ("checkpoints", "clip", "diffusers", "diffusion_models", "text_encoders", "unet", "vae")
"""Folders below ComfyUI's ``models`` that the pack's loaders list, or that hold what goes with them."""
TAKEN = (".safetensors", ".sft")
OTHER_KINDS = {".gguf": "GGUF", ".ckpt": "pickle", ".pt": "pickle", ".pth": "pickle", ".bin": "pickle", ".onnx": "ONNX"}
SHOWN = 5
"""Entries of one kind of trouble that are named."""


def check_models(comfyui: str) -> list[tuple[str, str, str]]:
    """Level, text and remedy of what is in the model folders of the ComfyUI in a folder; nothing is opened."""
    root = Path(comfyui) / "models"
    troubles: dict[str, list[str]] = {}
    files = 0
    for kind in KINDS:
        for path, trouble in _entries(root / kind):
            files += not trouble
            if trouble:
                where = os.fsencode(path).decode(errors="backslashreplace")
                troubles.setdefault(trouble, []).append(where)
    pipelines = len(pipelines_in(root / "diffusers"))
    found = [("ok", f"{files} model files and {pipelines} pipeline folders in {root}", "")]
    for trouble, paths in troubles.items():
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        text, _, remedy = trouble.partition("; ")
        found.append(("warn", f"{text}: {', '.join(paths[:SHOWN])}{more}", remedy))
    return found


def _entries(root: Path) -> Iterator[tuple[Path, str]]:
    """Model files below a folder, and what is wrong with each, and its remedy; empty where nothing is."""
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        try:
            place = os.path.realpath(folder)
            entries = [] if place in seen else sorted(os.scandir(folder), key=lambda entry: entry.name)
            seen.add(place)
        except FileNotFoundError:
            continue
        except OSError:
            yield folder, "no loader sees what is in it, as it cannot be read; let ComfyUI's user read it"
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if not path.exists():
                yield path, "a link that leads nowhere; download it again, or remove the link"
            elif entry.is_dir():
                waiting.append(path)
            elif path.suffix in TAKEN:
                yield path, _of_file(path)
            elif path.suffix in OTHER_KINDS and root.name != "vae":
                yield path, f"a {OTHER_KINDS[path.suffix]} file, which is not read; take the model as .safetensors"


def _of_file(path: Path) -> str:
    try:
        check_name(path)
    except ValueError:
        return "a name that is not UTF-8, which libraries cannot open; rename it"
    return "" if os.access(path, os.R_OK) else "a file that cannot be read; let ComfyUI's user read it"
