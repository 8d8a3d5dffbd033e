"""What holds for all tests: one thread each, which run side by side, and where the time goes, in the end."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import pytest

# Many processes share few cores here, and models are tiny: threads that wait for each other at every operation cost
# more than they give. Ranks, servers and commands that tests start inherit it; PyTorch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor do processes of the compiler's own, each of which imports torch for a handful of kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

SLOWEST = 10
ORDER = ("faults", "browser", "comfyui", "runtime", "distributed", "unit")
"""Folders as they are begun: the first two wait much and judge time, so they run beside each other; then the longest
ones, so that both processes end at about the same time."""


def folder_of(nodeid: str) -> str:
    """A test's folder, such as ``tests/unit``."""
    return PurePosixPath(nodeid.partition("::")[0]).parent.as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [f"tests/{name}" for name in ORDER]
    items.sort(key=lambda item: order.index(folder) if (folder := folder_of(item.nodeid)) in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2`` of pytest-xdist: each folder is one process's, so that its tests share servers and groups.

    Those of ``unit`` share nothing but within a file; they fill what time is left.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = folder_of(nodeid)
            return nodeid.partition("::")[0] if folder == "tests/unit" else folder

    config.option.loadscopereorder = False
    return ByFolder(config, log)


def _is_of_comfyui(report: object) -> bool:
    return isinstance(report, pytest.TestReport) and folder_of(report.nodeid) == "tests/comfyui"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which tests of a real ComfyUI ran, seconds by folder, fixtures included, and the slowest tests."""
    ran, skipped = (
        {report.nodeid for name in names for report in terminalreporter.stats.get(name, ()) if _is_of_comfyui(report)}
        for names in (("passed", "failed", "error"), ("skipped",))
    )
    if ran or skipped:
        terminalreporter.write_line(f"ComfyUI tests: {len(ran)} ran, {len(skipped)} skipped")
    folders: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folders[folder_of(report.nodeid)] += report.duration
                tests[report.nodeid] += report.duration
    if sum(folders.values()) < 10:
        return
    terminalreporter.section("seconds")
    for folder, seconds in folders.most_common():
        terminalreporter.write_line(f"{seconds:7.1f}  {folder}")
    terminalreporter.write_line(f"the {SLOWEST} slowest:")
    for test, seconds in tests.most_common(SLOWEST):
        terminalreporter.write_line(f"{seconds:7.1f}  {test}")
