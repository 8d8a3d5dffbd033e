"""Which files a server under test and the processes that it starts write, and which they read of a forbidden folder.

`install` runs in each of them before anything else (see tests/comfyui/launch_server.py). It uses Python's own audit
events, so files that a native library opens by itself are not seen; the pack has none that does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

LOG = "HYBRID_DIT_TEST_FILE_LOG"
"""Environment variable: where each use is noted, a line each; without it nothing is done."""
FORBIDDEN = "HYBRID_DIT_TEST_FORBIDDEN"
"""Environment variable: a folder of which reading is noted, too."""
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
"""Audit events that change files other than by opening them; their paths are the leading arguments."""


def install() -> None:
    """Note what this process does with files from now on."""
    log, forbidden = os.environ.get(LOG), os.environ.get(FORBIDDEN)
    if log is None or forbidden is None:
        return
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(what: str, path: object, folder: object = None) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            # Relative to an open folder, as shutil.rmtree goes about it.
            start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
            os.write(notes, f"{what}\t{os.path.realpath(os.path.join(start, os.fsdecode(path)))!a}\n".encode())

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                note("write", path)
            elif isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(forbidden):
                note("read", path)
        elif event in CHANGES:
            for path in arguments[:2]:
                note("write", path, arguments[-1])

    sys.addaudithook(hook)


def uses_outside(log: Path, allowed: Iterable[Path]) -> set[str]:
    """The notes of a log, but for writing in the allowed folders."""
    roots = [folder.resolve() for folder in allowed] + [Path("/proc"), Path("/dev")]
    found = set()
    for line in log.read_text().splitlines():
        what, _, quoted = line.partition("\t")
        path = Path(quoted[1:-1])
        if what == "read" or not any(path.is_relative_to(root) for root in roots):
            found.add(f"{what} {path}")
    return found
