"""``doctor --comfyui PATH``: in ComfyUI's own Python, with a look at its version."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from parallel_backend.cli import main
from parallel_backend.cli.doctor_comfyui import check_comfyui, in_its_python, python_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '#!/bin/sh\necho "in its own Python" >&2\nexec "{python}" "$@"\n'


def comfyui(folder: Path, version: str | None = "0.33.0", pins: str = "") -> Path:
    """What the doctor looks at of a ComfyUI, with a Python of its own."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(SCRIPT.format(python=sys.executable))
    python.chmod(0o755)
    (folder / "main.py").write_text("")
    (folder / "requirements.txt").write_text(f"torch\n{pins}\n")
    if version is not None:
        (folder / "comfyui_version.py").write_text(f'# This file is generated\n__version__ = "{version}"\n')
    return folder


def levels(found: list[tuple[str, str, str]]) -> list[str]:
    return [level for level, _, _ in found]


@pytest.fixture(autouse=True)
def inside(monkeypatch):
    monkeypatch.setenv("HYBRID_DIT_DOCTOR_INSIDE", "1")


def test_the_whole_command(tmp_path):
    folder = comfyui(tmp_path / "my ComfyUI", "0.12.1")
    command = [sys.executable, "-m", "parallel_backend", "doctor", "--comfyui", str(folder), "--json", "--tp=1"]
    outside = {name: value for name, value in os.environ.items() if name != "HYBRID_DIT_DOCTOR_INSIDE"}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert "in its own Python" in done.stderr
    assert done.returncode == 1
    report = json.loads(done.stdout)  # of one doctor, with the options of the first
    assert report["layout"] == "single"
    (finding,) = [finding for finding in report["findings"] if finding["text"].startswith("ComfyUI")]
    assert finding["level"] == "FAIL"
    assert finding["text"] == f"ComfyUI 0.12.1 is too old (0.14.0 or newer is needed), in {folder}"
    assert finding["remedy"] == "update ComfyUI"


def test_a_folder_without_comfyui(tmp_path, capsys):
    assert main(["doctor", "--comfyui", str(tmp_path)]) == 2
    assert f"--comfyui {tmp_path}: there is no ComfyUI (no main.py) in this folder" in capsys.readouterr().err


def test_a_comfyui_that_fits(tmp_path):
    (found,) = check_comfyui(str(comfyui(tmp_path)))
    assert found == ("ok", f"ComfyUI 0.33.0 in {tmp_path}, run by {sys.executable}", "")


def test_a_comfyui_that_does_not_say_its_version(tmp_path):
    found = check_comfyui(str(comfyui(tmp_path, None)))
    assert levels(found) == ["FAIL"]
    assert "does not say its version" in found[0][1]


def test_a_package_that_comfyui_pins_and_another_one_changed(tmp_path):
    have = metadata.version("pillow")
    pins = f"pillow==9.0.1\nnumpy=={metadata.version('numpy')}\nnot-installed-at-all==1.0"
    found = check_comfyui(str(comfyui(tmp_path, pins=pins)))
    assert levels(found) == ["ok", "warn"]
    assert found[1][1] == f"pillow {have} is newer than the 9.0.1 that this ComfyUI was made with"
    assert found[1][2] == f"{sys.executable} -m pip install -r {tmp_path / 'requirements.txt'}"


def test_without_an_environment_it_says_whose_python_it_looks_at(tmp_path, monkeypatch):
    folder = comfyui(tmp_path / "ComfyUI")
    (folder / "venv").rename(folder / "elsewhere")
    monkeypatch.delenv("HYBRID_DIT_DOCTOR_INSIDE")
    assert python_of(str(folder)) is None
    assert in_its_python(argparse.Namespace(comfyui=str(folder))) is None
    found = check_comfyui(str(folder))
    assert levels(found) == ["warn", "ok"]
    assert found[0][1].endswith(f"what follows is of {sys.executable}")


@pytest.mark.parametrize("place", ["ComfyUI/.venv", "venv"])
def test_other_places_of_an_environment(tmp_path, place):
    folder = comfyui(tmp_path / "ComfyUI")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (folder / "venv").rename(tmp_path / place)
    assert python_of(str(folder)) == str(tmp_path / place / "bin" / "python")
