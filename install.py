"""Adds diffusers to the Python that runs this, ComfyUI's own, and changes nothing that is installed there.

ComfyUI-Manager runs it after it has fetched the pack; by hand: ``python install.py``. A line of requirements.txt could
not do that: pip, asked for diffusers alone, takes the newest one and with it other versions of safetensors and
huggingface_hub, with which an older transformers, and so ComfyUI, no longer starts. Arguments are handed to pip.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parallel_backend.requirements import REQUIRED, installed, older, one_line, problems

NAME = "diffusers"
COMFYUI_OWNS = (
    "torch", "torchvision", "torchaudio", "transformers", "tokenizers", "numpy", "pillow", "safetensors",
    "comfyui-frontend-package",
)  # fmt: skip
"""What stays as it is in any case. All else does too, unless no diffusers fits it."""


def main() -> int:
    """Install diffusers unless it is there; pip's exit status."""
    version, least = installed(NAME), REQUIRED[NAME]
    if version is not None and not older(version, least):
        print(f"hybrid-dit: {NAME} {version} is there; nothing to install")
        return 0
    if importlib.util.find_spec("pip") is None:
        print(f"hybrid-dit: {sys.executable} has no pip; install '{NAME}>={least}' with what installed its packages")
        return 1
    versions = _versions()
    versions.pop(NAME, None)
    owned = {name: versions[name] for name in COMFYUI_OWNS if name in versions}
    print(f"hybrid-dit: adding {NAME}, and changing nothing else", flush=True)
    # Its errors are not the last word; those of the network come again below.
    if status := _install(versions, [], subprocess.DEVNULL):
        # What transformers needs counts as well, so that it is not left without it.
        print("hybrid-dit: none fits all that is installed; keeping what ComfyUI brings", flush=True)
        status = _install(owned, [f"transformers=={owned['transformers']}"] if "transformers" in owned else [])
    if status:
        wrong = one_line(problems({name: installed(name) for name in REQUIRED}))
        print(f"hybrid-dit: nothing was installed; {wrong}")
    return status


def _install(kept: dict[str, str], asked: list[str], errors: int | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "installed.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in kept.items()))
        command = [sys.executable, "-m", "pip", "install", f"{NAME}>={REQUIRED[NAME]}", *asked, "-c", str(constraints)]
        return subprocess.run([*command, *sys.argv[1:]], stderr=errors, check=False).returncode


def _versions() -> dict[str, str]:
    found = {}
    for package in metadata.distributions():
        name, version = package.metadata["Name"], package.version
        # pip refuses a whole file of constraints for one version that does not follow the standard.
        if name and version and re.fullmatch(r"\d[\w.!]*(\+[\w.]+)?", version):
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return found


if __name__ == "__main__":
    sys.exit(main())
