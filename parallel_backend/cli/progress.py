"""Progress of a command: a bar of tqdm for each stage."""

from __future__ import annotations

import sys

from tqdm import tqdm

_UNITS = {"starting": "process", "loading": "B", "sampling": "step"}
LOG_SECONDS = 10
"""Where there is no terminal, a bar is written anew after so many seconds, as each becomes a line of a log."""


class ProgressBar:
    """One bar on stderr at a time; a stage's is left as it ends. A context manager, which closes the last one."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: tqdm | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, stage: str, done: float, total: float, detail: str) -> None:
        """Say how far a stage is; stages that nobody waits for are passed over."""
        unit = _UNITS.get(stage)
        if unit is None:
            return
        if stage != self.stage:
            self.__exit__()
            interval = 0.1 if sys.stderr.isatty() else LOG_SECONDS
            self.stage = stage
            self.bar = tqdm(
                desc=stage, total=total, unit=unit, unit_scale=unit == "B", unit_divisor=1024, mininterval=interval
            )
        assert self.bar is not None
        self.bar.total = total
        self.bar.set_postfix_str(detail, refresh=False)
        self.bar.update(done - self.bar.n)
