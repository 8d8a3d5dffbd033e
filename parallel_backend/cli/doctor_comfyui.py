"""What the doctor does with ``--comfyui PATH``: it goes into the Python of that ComfyUI, and looks at its version."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ..requirements import comfyui_problem, installed, older

INSIDE = "HYBRID_DIT_DOCTOR_INSIDE"
"""Environment variable: set in the doctor that another doctor has started in ComfyUI's Python."""
ROOT = Path(__file__).resolve().parents[2]
_PIN = re.compile(r"([\w.-]+)==([\w.+!]+)")


def in_its_python(arguments: argparse.Namespace) -> int | None:
    """Run the doctor in ComfyUI's own Python; its exit status, or None where this Python is the one to look at.

    Raises:
        ValueError: there is no ComfyUI in the folder.
    """
    folder = arguments.comfyui
    if not (Path(folder) / "main.py").is_file():
        raise ValueError(f"--comfyui {folder}: there is no ComfyUI (no main.py) in this folder")
    python = python_of(folder)
    if os.environ.get(INSIDE) or python is None:
        return None
    # The library need not be installed there: it is the one of this doctor.
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from parallel_backend.cli import main; sys.exit(main())"
    given = {f"--{name}": value for name, value in vars(arguments).items() if name != "command" and value is not None}
    options = [name if value is True else f"{name}={value}" for name, value in given.items() if value is not False]
    return subprocess.run(
        [python, "-c", start, "doctor", *options], env={**os.environ, INSIDE: "1"}, check=False
    ).returncode


def python_of(folder: str) -> str | None:
    """The Python of the environment in ComfyUI's folder, or beside it; None where there is none."""
    here = Path(folder).resolve()
    places = [place / name / "bin" / "python" for place in (here, here.parent) for name in ("venv", ".venv")]
    return next((str(place) for place in places if place.exists()), None)


def check_comfyui(folder: str) -> list[tuple[str, str, str]]:
    """Level, text and remedy of what was checked of the ComfyUI in ``folder`` and of the Python that runs this."""
    found = []
    if not os.environ.get(INSIDE):
        text = f"no environment (venv or .venv) in {folder} or beside it: what follows is of {sys.executable}"
        remedy = "run this with the Python that starts ComfyUI, if that is another"
        found.append(("warn", text, remedy))
    version = _version(Path(folder))
    problem = comfyui_problem(version)
    if problem:
        found.append(("FAIL", f"{problem.text}, in {folder}", problem.remedy))
    else:
        found.append(("ok", f"ComfyUI {version} in {folder}, run by {sys.executable}", ""))
    requirements = Path(folder) / "requirements.txt"
    for name, wanted in _pins(requirements):
        have = installed(name)
        # A newer one is ComfyUI's own, updated; so is what another one's requirements brought in. Both are said.
        if have is not None and have != wanted:
            is_what = "older" if older(have, wanted) else "newer"
            text = f"{name} {have} is {is_what} than the {wanted} that this ComfyUI was made with"
            remedy = f"{sys.executable} -m pip install -r {shlex.quote(str(requirements))}"
            found.append(("warn", text, remedy))
    return found


def _version(folder: Path) -> str | None:
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"""__version__ = ["'](.+?)["']""", text)
    return match[1] if match else None


def _pins(requirements: Path) -> list[tuple[str, str]]:
    try:
        lines = requirements.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(match[1], match[2]) for line in lines if (match := _PIN.fullmatch(line.strip()))]
