"""A process that measures rows of figures: read as it writes them; it ends when nobody waits for it any longer."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class RowProcess:
    """What is to be run, and what came of it.

    Args:
        command: writes a line of JSON to ``out`` for each row.
        environment: of the process.
        out, log: files for its rows, and for what it says.

    Attributes:
        count: rows that came.
        returncode: its exit status; None where it was ended, as its time was over.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], out: Path, log: Path) -> None:
        self.command, self.environment, self.out, self.log = command, environment, out, log
        self.count = 0
        self.returncode: int | None = None

    def rows(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Run it, for so long at most; each row as it comes."""
        began = time.perf_counter()
        with self.log.open("w") as said:
            process = subprocess.Popen(self.command, env=dict(self.environment), stdout=said, stderr=said)
            try:
                while self.returncode is None:
                    self.returncode = process.poll()
                    lines = self.out.read_text().splitlines(keepends=True) if self.out.exists() else []
                    for line in lines[self.count :]:
                        if line.endswith("\n"):
                            yield json.loads(line)
                            self.count += 1
                    if self.returncode is None:
                        if time.perf_counter() - began > seconds:
                            return
                        time.sleep(0.2)
            finally:
                if process.poll() is None:
                    process.terminate()
                process.wait()

    def last_lines(self, number: int) -> list[str]:
        """The last lines that it said."""
        return self.log.read_text().strip().splitlines()[-number:]
