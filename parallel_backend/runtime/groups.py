"""The worker groups of this process: equal configurations share one, and groups in each other's way are replaced."""

from __future__ import annotations

import atexit
import os
import threading

from .client import Check, OnState, WorkerGroup
from .group_config import GroupConfig

_groups: dict[GroupConfig, WorkerGroup] = {}
_groups_lock = threading.RLock()
CPU_GROUPS = 2
"""Groups on the CPU that may live side by side; the least recently used goes first."""


def acquire_group(
    config: GroupConfig, on_state: OnState = lambda *_: None, check: Check = lambda: None, port: int = 0
) -> WorkerGroup:
    """The group of a configuration: the one that is up, or a fresh one. Groups in the way of it are closed first.

    ``on_state`` and ``check`` are those of `WorkerGroup.start`; they are not called for a group that is up.
    """
    with _groups_lock:
        group = _groups.get(config)
        if group is not None and group.ready:
            _groups[config] = _groups.pop(config)  # the last one used stands last
            return group
        if group is not None:
            group.close()
            del _groups[config]
        for other in [other for other in _groups if other.devices.overlaps(config.devices)]:
            _groups.pop(other).close()
        on_cpu = [other for other in _groups if other.devices.kind == "cpu"]
        if config.devices.kind == "cpu":
            for other in on_cpu[: len(on_cpu) - CPU_GROUPS + 1]:
                _groups.pop(other).close()
        group = WorkerGroup(config, port)
        group.start(on_state, check)
        _groups[config] = group
        return group


def find_group(config: GroupConfig) -> WorkerGroup | None:
    """The group of a configuration if it is up."""
    group = _groups.get(config)
    return group if group is not None and group.ready else None


def close_groups() -> int:
    """End every group; how many there were."""
    with _groups_lock:
        count = len(_groups)
        for group in _groups.values():
            group.close()
        _groups.clear()
        return count


def _forget_groups() -> None:
    # A forked child has neither the parent's ranks nor the right to end them.
    _groups.clear()


atexit.register(close_groups)
if hasattr(os, "register_at_fork"):  # not on Windows, where the pack still loads and says that it needs Linux
    os.register_at_fork(after_in_child=_forget_groups)
