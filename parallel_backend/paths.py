"""Where the project keeps files of its own on the user's machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

KEPT_LOGS = 10
"""Log folders of earlier groups that are kept."""


def home() -> Path:
    """``$HYBRID_DIT_HOME``, else ``~/.cache/hybrid-dit``."""
    configured = os.environ.get("HYBRID_DIT_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "hybrid-dit"


def new_private_folder() -> Path:
    """A folder that nobody else can enter (mode 0700), with a path short enough for a socket's address."""
    folder = tempfile.mkdtemp(prefix="hybrid-dit-")
    if len(folder) > 90:  # an AF_UNIX address has 107 bytes
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="hybrid-dit-", dir="/tmp")
    return Path(folder)


def new_log_folder() -> Path:
    """A folder for the logs of a new group, in the place of the oldest one."""
    root = home() / "logs"
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)  # a prompt's text may be in a traceback
    for old in sorted(root.iterdir())[: -KEPT_LOGS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=root, prefix=time.strftime("%Y%m%d-%H%M%S-")))
