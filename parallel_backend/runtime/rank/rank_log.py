"""A rank's log: everything that it and its libraries print, in one file of bounded size that only the user can read."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

MAX_BYTES = 8 << 20
"""A log that grows beyond it loses its older half."""
CHECK_SECONDS = 2.0


def log_file(folder: Path, rank: int) -> Path:
    """Where a rank's log is."""
    return folder / f"rank-{rank}.log"


def log_to(file: Path) -> None:
    """Send this process's output to a file from now on, that of native code too, and keep the file within bounds.

    SIGUSR1 has every thread's stack written to it, as a crash of native code has.
    """
    # Appending: what other threads write after the file was cut lands at its new end.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_keep_bounded, args=(file,), daemon=True).start()


def end_at_once(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """A ``sys.excepthook`` that skips Python's own end: taking torch apart takes seconds, and somebody waits."""
    traceback.print_exception(kind, error, where)
    sys.stderr.flush()
    os._exit(1)


def _keep_bounded(file: Path) -> None:
    while True:
        time.sleep(CHECK_SECONDS)
        try:
            shorten(file, MAX_BYTES)
        except OSError:  # the folder was removed: nobody is going to read it
            return


def shorten(file: Path, limit: int) -> None:
    """Cut a file that is larger than so many bytes to its last lines, half as many bytes; lines that come meanwhile may
    be lost."""
    if file.stat().st_size <= limit:
        return
    with file.open("r+b") as log:
        log.seek(-(limit // 2), os.SEEK_END)
        rest = log.read()
        log.seek(0)
        log.truncate()
        log.write(b"(older lines were removed)\n" + rest[rest.find(b"\n") + 1 :])
