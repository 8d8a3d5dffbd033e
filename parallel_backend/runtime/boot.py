"""How a process of the workers' is started: with its client's interpreter settings, and to import what it would.

Its own file is run as a script, which keeps the folder that ComfyUI was started in off the import path: a module there
may have the name of one that libraries import.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence

IMPORT_PATH = "HYBRID_DIT_IMPORT_PATH"
"""Variable with the import path of the client, for its workers."""
LIBRARIES = ("torch", "numpy", "safetensors", "transformers", "diffusers")
"""What workers compute with."""
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command that runs ``main`` of a module as this process would import it; `IMPORT_PATH` has to be set."""
    import subprocess

    settings = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # multiprocessing's way
    return [sys.executable, "-u", *settings, os.path.realpath(__file__), module, *arguments]


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """Module and arguments of a `command`."""
    at = list(words).index(os.path.realpath(__file__)) + 1
    return words[at], list(words[at + 1 :])


def import_path() -> str:
    """What `IMPORT_PATH` has to be for workers of this process.

    It is this process's own, but for its current folder, and in another order: first come Python's own modules, then
    where this process has found its `LIBRARIES`. A node pack that has put its folder in front, with a module ``queue``
    or ``utils`` in it, has mostly done so when they had been imported.
    """
    import sysconfig

    own = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    own |= {os.path.join(folder, "lib-dynload") for folder in own}
    entries = [_absolute(entry) for entry in sys.path if isinstance(entry, str) and entry not in ("", ".")]
    first = [entry for entry in entries if os.path.realpath(entry) in own]
    libraries = {os.path.realpath(os.path.dirname(folder)) for folder in map(_folder_of, LIBRARIES) if folder}
    first += [entry for entry in entries if os.path.realpath(entry) in libraries]
    # Last comes where this package is: only processes that ranks start in turn look there for it.
    return json.dumps(list(dict.fromkeys([*first, *entries, os.path.dirname(os.path.realpath(_PACKAGE))])))


def _folder_of(package: str) -> str:
    """Where this process has imported a package from, or would; empty where it is not there."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # somebody has put something else in its place
        return ""
    return next(iter(spec.submodule_search_locations or ()), "") if spec is not None else ""


def _absolute(entry: str) -> str:
    return os.path.abspath(entry) if os.path.exists(entry) else entry  # others are names for import hooks


def _import_package() -> None:
    """Import the package that this file belongs to, whatever else has its name on the import path."""
    name = os.path.basename(_PACKAGE)
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(_PACKAGE, "__init__.py"), submodule_search_locations=[_PACKAGE]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)


def main() -> None:
    """Entry point: ``boot.py MODULE ARGUMENTS``."""
    sys.path[:] = json.loads(os.environ[IMPORT_PATH])
    _import_package()
    module = sys.argv[1]
    found = importlib.import_module(module)
    sys.argv = [str(found.__file__), *sys.argv[2:]]
    found.main()


if __name__ == "__main__":
    main()
