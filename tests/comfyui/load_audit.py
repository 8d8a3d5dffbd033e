"""What loading the pack makes ComfyUI import, and start, noted in the server under test (see `launch_server`)."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from pathlib import Path

LOG = "HYBRID_DIT_TEST_LOAD_LOG"
"""Environment variable: where it is noted, a line each; without it nothing is done."""
CHECKOUT = str(Path(__file__).resolve().parents[2])
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "_thread.start_new_thread")


def install() -> None:
    """Note what the pack does while ComfyUI loads it."""
    log = os.environ.get(LOG)
    if log is None:
        return
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    load = importlib.machinery.SourceFileLoader.exec_module

    def note(text: str) -> None:
        if _by_the_loading_pack():
            os.write(notes, f"{text}\n".encode())

    def exec_module(self, module) -> None:
        note(f"import {module.__name__}")
        load(self, module)

    importlib.machinery.SourceFileLoader.exec_module = exec_module
    sys.addaudithook(lambda event, _: note(f"start {event}") if event in STARTS else None)


def _by_the_loading_pack() -> bool:
    frame, ours = sys._getframe(2), False
    while frame is not None:
        code = frame.f_code
        ours = ours or os.path.realpath(code.co_filename).startswith((f"{CHECKOUT}/nodes/", f"{CHECKOUT}/__init__"))
        if ours and code.co_name == "load_custom_node":
            return True
        frame = frame.f_back
    return False
