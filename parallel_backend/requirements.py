"""Least versions of what the project runs on, and what is too old or missing. Imports nothing but Python's own.

They are those of pyproject.toml, for the command line and scripts. Inside ComfyUI all but diffusers is ComfyUI's: it is
never changed by installing the pack (``install.py``), so what is too old is said, with the remedy, and no more.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REQUIRED = {
    "torch": "2.10",
    "diffusers": "0.38",
    "transformers": "5.0",
    "safetensors": "0.8",
    "pillow": "10",
    "numpy": "1.25",
    "tqdm": "4.60",
}
"""Least versions, as in pyproject.toml."""
COMFYUI = "0.14.0"
"""Least version of ComfyUI, as in pyproject.toml."""
INSTALL = Path(__file__).resolve().parents[1] / "install.py"
"""What adds diffusers and changes nothing else; not there where the library was installed by itself."""
TORCH = "https://pytorch.org/get-started"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what the user can do about it; each is part of one line."""

    text: str
    remedy: str


def installed(name: str) -> str | None:
    """The version of a package that this Python would import; None where it has none, or cannot tell."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problems(versions: Mapping[str, str | None], python: str = sys.executable) -> list[Problem]:
    """What is too old or missing among the installed ``versions`` (all of `REQUIRED`), with commands for ``python``."""
    bad = {name: versions.get(name) for name, least in REQUIRED.items() if older(versions.get(name) or "0", least)}
    command = _command(bad, versions, shlex.quote(python))
    found = []
    for name, version in bad.items():
        what = "is not installed" if version is None else f"{version} is too old"
        # torchvision and torchaudio fit one release of torch: by itself, torch would leave ComfyUI broken.
        torch = f"install torch, torchvision and torchaudio of one newer release together ({TORCH})"
        found.append(
            Problem(f"{name} {what} ({REQUIRED[name]} or newer is needed)", torch if name == "torch" else command)
        )
    return found


def one_line(found: Sequence[Problem]) -> str:
    """All problems in one line, each remedy once."""
    texts: dict[str, list[str]] = {}
    for problem in found:
        texts.setdefault(problem.remedy, []).append(problem.text)
    return "; ".join(f"{', '.join(lines)}: {remedy}" for remedy, lines in texts.items())


def comfyui_problem(version: str | None) -> Problem | None:
    """What is wrong with a ComfyUI of this version; None for one that does not say which it is, as old ones do not."""
    if version is not None and not older(version, COMFYUI):
        return None
    what = f"ComfyUI {version}" if version else "this ComfyUI, which does not say its version,"
    return Problem(f"{what} is too old ({COMFYUI} or newer is needed)", "update ComfyUI")


def older(version: str, least: str) -> bool:
    """Whether ``version`` comes before ``least``, as far as ``least`` is given: 2.10.0a0+git is not older than 2.10."""
    numbers = [[int(number) for number in re.findall(r"\d+", text)] for text in (version, least)]
    return numbers[0][: len(numbers[1])] < numbers[1]


def _command(bad: Collection[str], versions: Mapping[str, str | None], python: str) -> str:
    if set(bad) - {"torch"} == {"diffusers"} and INSTALL.is_file():
        return f"{python} {shlex.quote(str(INSTALL))}"
    asked = [f"'{name}>={REQUIRED[name]}'" for name in bad if name != "torch"]
    # These share what they need: pip leaves the other one working only if it is named too.
    asked += [f"{name}=={versions[name]}" for name in ("transformers", "diffusers") if name not in bad]
    return f"{python} -m pip install {' '.join(asked)}"
