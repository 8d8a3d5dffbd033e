"""Where the project keeps files of its own on the user's machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``$HYBRID_DIT_HOME``, else ``~/.cache/hybrid-dit``."""
    configured = os.environ.get("HYBRID_DIT_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "hybrid-dit"
