"""Starts ComfyUI's main.py, making up for torchvision and torchaudio wheels that were built for another torch.

Run it with ComfyUI's own Python in ComfyUI's folder; all arguments go to main.py::

    cd ComfyUI && venv/bin/python .../tests/comfyui/launch_server.py --cpu --port 8188

The package index has only CUDA builds of torchvision and torchaudio. Beside a CPU torch their native libraries cannot
load, and then ``import torchvision`` (which ComfyUI and transformers need) and ``import torchaudio`` fail. Two import
hooks repair exactly that, at the moment of the import and only where the native library did not load, so with proper
wheels nothing changes. Nothing in site-packages is edited. Child processes (the ranks of a worker group) inherit the
hooks through a ``sitecustomize`` module on PYTHONPATH.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SCRATCH_VARIABLE = "HYBRID_DIT_LAUNCH_SCRATCH"
"""Environment variable: the folder for ``sitecustomize.py``. Without it, a temporary folder is made."""
HOOKS_VARIABLE = "HYBRID_DIT_TEST_HOOKS"
"""Environment variable: Python files, with os.pathsep between them; this process and its children call ``install``."""

_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# Operators keep their definition for as long as their Library object lives.
_libraries: list[Any] = []


def _define_missing_nms(_: ModuleType) -> None:
    """Before ``torchvision._meta_registrations``, which registers fakes for operators that need to exist by then."""
    import torch

    missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _NMS_SCHEMA)
        _libraries.append(library)


def _load_softly(module: ModuleType) -> None:
    """After ``torchaudio._extension.utils``: a native library that does not load counts as one that is not there."""
    load = module._load_lib

    def load_or_do_without(lib: str) -> bool:
        try:
            return load(lib)
        except OSError:
            return False

    module._load_lib = load_or_do_without


# module name -> (to call before its code runs, to call after)
_HOOKS: dict[str, tuple[Callable[[ModuleType], None] | None, Callable[[ModuleType], None] | None]] = {
    "torchvision._meta_registrations": (_define_missing_nms, None),
    "torchaudio._extension.utils": (None, _load_softly),
}


class _HookedLoader(importlib.abc.Loader):
    def __init__(self, name: str, loader: importlib.abc.Loader) -> None:
        self.name = name
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        before, after = _HOOKS[self.name]
        if before is not None:
            before(module)
        self.loader.exec_module(module)
        if after is not None:
            after(module)


class _HookFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _HOOKS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(fullname, spec.loader)
        return spec


def install_import_hooks() -> None:
    """Install the hooks in this process. Imports nothing: ComfyUI wants to be the first to import torch."""
    if not any(type(finder).__name__ == _HookFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _HookFinder())


def _further_hooks() -> list[str]:
    return [file for file in os.environ.get(HOOKS_VARIABLE, "").split(os.pathsep) if file]


def export_import_hooks(folder: Path) -> None:
    """Make the Python processes that this one starts install the hooks too, by a ``sitecustomize.py`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import runpy\n\n"
        f"runpy.run_path({str(Path(__file__).resolve())!r}, run_name='launch_server')['install_import_hooks']()\n"
        + "".join(f"runpy.run_path({hooks!r}, run_name='hooks')['install']()\n" for hooks in _further_hooks())
    )
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), inherited] if inherited else [str(folder)])


def main() -> None:
    """Run main.py of the current folder as ``__main__`` with this process' arguments."""
    script = Path.cwd() / "main.py"
    if not script.is_file():
        raise SystemExit(f"launch_server: {script} does not exist; start me in ComfyUI's folder")
    scratch = os.environ.get(SCRATCH_VARIABLE)
    if scratch is None:
        scratch = tempfile.mkdtemp(prefix="hybrid-dit-launch-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    install_import_hooks()
    for hooks in _further_hooks():
        runpy.run_path(hooks, run_name="hooks")["install"]()
    export_import_hooks(Path(scratch))
    # Our own folder must go: it has a server.py, and so has ComfyUI.
    sys.path[0] = str(script.parent)
    sys.argv[0] = str(script)
    # ComfyUI wraps stdout and keeps this setting; without it, what nodes print into a file comes 8 KB later or never.
    sys.stdout.reconfigure(line_buffering=True)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
