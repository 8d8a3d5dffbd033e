"""Older releases of ComfyUI, out of the history of the clone that the other tests use."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .server import comfyui_python


def release(comfyui: Path, version: str, cache: Path) -> Path:
    """A folder with that release of ComfyUI, run by the Python of ``comfyui``; made once and kept in ``cache``."""
    folder = cache / version
    if (folder / "venv").exists():
        return folder
    commit = next((commit for commit in _commits(comfyui) if _version(comfyui, commit) == version), None)
    if commit is None:
        pytest.skip(f"{comfyui} has no history with ComfyUI {version}: make it with scripts/setup_comfyui.sh")
    # A partial clone may lack some large tokenizer files, which a start does not need.
    missing = {
        line[1:] for line in _git(comfyui, "rev-list", "--objects", "--missing=print", "-n1", commit) if line[0] == "?"
    }
    entries = [line.split("\t", 1) for line in _git(comfyui, "ls-tree", "-r", commit)]
    left_out = [f":!{path}" for meta, path in entries if meta.split()[2] in missing]
    folder.mkdir(parents=True, exist_ok=True)
    index = {"GIT_INDEX_FILE": str(cache / f"{version}.index")}
    _git(comfyui, f"--work-tree={folder}", "checkout", commit, "--", ".", *left_out, environment=index)
    environment = comfyui_python(comfyui).parents[1]
    (folder / "venv").symlink_to(environment, target_is_directory=True)
    return folder


def _commits(comfyui: Path) -> list[str]:
    """Where the version was changed, the newest first."""
    return _git(comfyui, "log", "--format=%H", "--", "comfyui_version.py")


def _version(comfyui: Path, commit: str) -> str:
    text = "\n".join(_git(comfyui, "show", f"{commit}:comfyui_version.py"))
    return text.partition('__version__ = "')[2].partition('"')[0]


def _git(comfyui: Path, *arguments: str, environment: dict[str, str] | None = None) -> list[str]:
    done = subprocess.run(
        ["git", "-C", str(comfyui), *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and arguments[0] != "log":
        pytest.fail(f"git {arguments[0]} in {comfyui}: {done.stderr}")
    return [line for line in done.stdout.splitlines() if line]
