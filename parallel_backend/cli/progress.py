"""Progress on a terminal, or as lines where there is none."""

from __future__ import annotations

import sys

_WIDTH = 30
_UNITS = {"starting": "processes", "loading": "MiB", "sampling": "steps"}


class ProgressBar:
    """A progress bar for each stage; on a terminal it redraws its line, elsewhere it prints a line a stage."""

    def __init__(self) -> None:
        self.stage = self.finished = ""

    def show(self, stage: str, done: float, total: float, detail: str) -> None:
        """Say how far a stage is; stages that nobody waits for are passed over."""
        unit = _UNITS.get(stage)
        if unit is None:
            return
        if unit == "MiB":
            done, total = done / 2**20, total / 2**20
        filled = round(_WIDTH * done / total) if total else 0
        line = f"{stage:9} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done:.0f}/{total:.0f} {unit} {detail}".rstrip()
        finished = done >= total and self.finished != stage
        if sys.stdout.isatty():
            new = "\n" if self.stage and stage != self.stage else ""
            print(f"{new}\r{line}\033[K", end="\n" if finished and stage == "sampling" else "", flush=True)
        elif finished:
            print(line, flush=True)
        self.stage = stage
        if finished:
            self.finished = stage
