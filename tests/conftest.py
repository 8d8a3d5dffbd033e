"""What holds for all tests: one thread each, and where the time goes, in the end."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import PurePosixPath

import pytest

# Many processes share few cores here, and models are tiny: threads that wait for each other at every operation cost
# more than they give. Ranks, servers and commands that tests start inherit it; PyTorch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor do processes of the compiler's own, each of which imports torch for a handful of kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

SLOWEST = 10


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds by folder, fixtures included, and the slowest tests."""
    folders: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folders[PurePosixPath(report.nodeid.partition("::")[0]).parent.as_posix()] += report.duration
                tests[report.nodeid] += report.duration
    if sum(folders.values()) < 10:
        return
    terminalreporter.section("seconds")
    for folder, seconds in folders.most_common():
        terminalreporter.write_line(f"{seconds:7.1f}  {folder}")
    terminalreporter.write_line(f"the {SLOWEST} slowest:")
    for test, seconds in tests.most_common(SLOWEST):
        terminalreporter.write_line(f"{seconds:7.1f}  {test}")
