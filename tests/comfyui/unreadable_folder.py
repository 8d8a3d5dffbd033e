"""In the server under test (see `launch_server`): folders called ``locked`` may not be seen, not even by root."""

from __future__ import annotations

import errno
import os


def install() -> None:
    """Have what asks for the time of such a folder, or for its entries, be refused."""
    getmtime, scandir = os.path.getmtime, os.scandir

    def refuse_or(ask):
        def answer(path="."):
            if not isinstance(path, int) and os.path.basename(os.fspath(path)) in ("locked", b"locked"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return ask(path)

        return answer

    os.path.getmtime, os.scandir = refuse_or(getmtime), refuse_or(scandir)
