"""Model folders as people have them: nested, linked, in the Hub's cache, with entries that cannot be read."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

INDEX = "model_index.json"
"""What a pipeline folder has."""
HUB, SNAPSHOTS = "models--", "snapshots"
"""The Hub's cache keeps ORG/NAME in ``models--ORG--NAME``, each revision of it in a folder below ``snapshots``."""
_told: set[str] = set()


def pipelines_in(root: Path) -> dict[str, Path]:
    """The pipeline folders at and below a folder, by the names that a list shows.

    A name is the path from ``root``, such as ``NAME`` or ``ORG/NAME``. A model in the Hub's cache is called ORG/NAME,
    too, which is its main revision; others of its revisions have their path. What cannot be read is left out, with a
    line in the log.
    """
    if is_pipeline(root):
        return {root.name: root}
    found: dict[str, Path] = {}
    cached: dict[str, Path] = {}
    for folder, _ in _walk(root, stop=is_pipeline):
        if is_pipeline(folder):
            found[folder.relative_to(root).as_posix()] = folder
        elif folder.name.startswith(HUB) and (main := main_snapshot(folder)):
            name = folder.name.removeprefix(HUB).replace("--", "/")
            cached[(folder.parent.relative_to(root) / name).as_posix()] = main
    for name, folder in cached.items():
        if name not in found:
            found.pop(folder.relative_to(root).as_posix(), None)
            found[name] = folder
    return found


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline's; not where that cannot be seen."""
    return os.path.isfile(folder / INDEX)


def main_snapshot(folder: Path) -> Path | None:
    """Of a model in the Hub's cache the pipeline folder of the main revision, or else of the newest one."""
    try:
        main = folder / SNAPSHOTS / (folder / "refs" / "main").read_text(errors="replace").strip()
        if main.parent == folder / SNAPSHOTS and is_pipeline(main):
            return main
    except (OSError, ValueError):
        pass
    snapshots = [path for path, _ in _walk(folder / SNAPSHOTS, stop=is_pipeline) if is_pipeline(path)]
    return max(snapshots, key=lambda path: (os.path.getmtime(path / INDEX), path), default=None)


def model_name(path: Path) -> str:
    """What people call the model at a path: the name of its file or folder, but of no revision in the Hub's cache."""
    if path.parent.name == SNAPSHOTS and path.parent.parent.name.startswith(HUB):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def files_below(root: Path) -> list[Path]:
    """All files below a folder, sorted; also those behind links, which are there once for each of their names."""
    return sorted(folder / name for folder, files in _walk(root) for name in files)


def file_state(file: Path) -> str:
    """Another one when a file, or what a link leads to, was changed, by size, time and place.

    Raises:
        ValueError: it cannot be read, or is gone.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    return f"{status.st_size}-{status.st_mtime_ns}-{os.path.realpath(file)}"


def check_name(path: Path) -> None:
    """Raise ValueError for a path that is no text: the libraries that read models cannot open such a one."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the path {os.fsencode(path).decode(errors='backslashreplace')} is not UTF-8, and the libraries that read "
            "models take no other names; rename the file or folder"
        ) from None


def _walk(root: Path, stop: Callable[[Path], bool] = lambda folder: False) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names of their files; links are followed, but never round in a circle.

    Hidden entries and what cannot be read are left out. Of folders that ``stop`` is true of nothing is looked at.
    """
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        folders, files = [], []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in above:
                continue
            above |= {(status.st_dev, status.st_ino)}
            for entry in [] if stop(folder) else sorted(os.scandir(folder), key=lambda entry: entry.name):
                with contextlib.suppress(OSError):  # of what may not be seen, or of a link that can lead nowhere
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        files.append(entry.name)
        except FileNotFoundError:
            continue
        except OSError as error:
            _tell(folder, error)
            continue
        yield folder, files
        waiting += [(folder / name, above) for name in reversed(folders)]


def _tell(folder: Path, error: OSError) -> None:
    """Say once that a folder is left out."""
    where = os.fsencode(folder).decode(errors="backslashreplace")
    if where not in _told:
        _told.add(where)
        log.warning("the folder %s is left out: it cannot be read (%s)", where, error.strerror)
