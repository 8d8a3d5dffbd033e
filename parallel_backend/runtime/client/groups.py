"""The worker groups of this process and the models in them: found again, and replaced where they are in the way."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter
from pathlib import Path

from ...loading.checkpoint import imports_of, open_checkpoint
from ..errors import RequestFailedError, WorkersFailedError
from ..group_config import GroupConfig, ModelConfig
from .ranks import POLL_SECONDS, Check
from .remote_model import RemoteModel
from .worker_group import OnState, WorkerGroup

log = logging.getLogger(__name__)

_groups: dict[GroupConfig, WorkerGroup] = {}
_ending: list[WorkerGroup] = []
"""Groups whose processes may still be there, and hold memory."""
_groups_lock = threading.RLock()
_users: Counter[ModelConfig] = Counter()
_users_lock = threading.Lock()
_released: queue.SimpleQueue[ModelConfig] = queue.SimpleQueue()
"""Models that somebody refers to no longer, which `_users` does not know yet. A finalizer may run in the middle of
anything, also of what holds a lock, and this is what it can safely do."""
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()
"""Something for each of them, for the housekeeper to wait for."""
_housekeeper: threading.Thread | None = None
ENDING_SECONDS = 60.0
"""How long processes that were killed may take to be gone."""
CPU_GROUPS = 2
"""Groups on the CPU that may live side by side; the least recently used goes first."""


def acquire_model(
    config: ModelConfig, on_state: OnState = lambda *_: None, check: Check = lambda: None, port: int = 0
) -> RemoteModel:
    """The model of a configuration, loaded into the group of its devices, which is started where it is not up.

    ``on_state`` and ``check`` are those of `WorkerGroup.start` and `WorkerGroup.load`; they are not called for a model
    that is there. Groups that share a GPU or an endpoint with the one that is needed are closed first.
    """
    with _groups_lock:
        group = _groups.get(config.group)
        if group is None or not group.usable:
            group = _make_way(config.group, check, port)
        # Nothing where it is up, as it is in each step but the first: then no file is looked at, either.
        group.start(on_state, check, _imports(config) if group.state == "new" else ())
        _groups[config.group] = _groups.pop(config.group)  # the last one used stands last
        return group.load(config, on_state, check, orphans=lambda other: other != config and not _is_used(other))


def _imports(config: ModelConfig) -> list[str]:
    try:
        return imports_of(open_checkpoint(Path(config.path), config.part))
    except ValueError:  # loading it says what is wrong with it
        return []


def _make_way(config: GroupConfig, check: Check, port: int) -> WorkerGroup:
    """A new group, not started, in the place of those in the way, whose processes are gone."""
    in_the_way = [other for other in _groups if other == config or other.conflicts(config)]
    if config.devices.kind == "cpu":
        on_cpu = [other for other in _groups if other.devices.kind == "cpu" and other != config]
        in_the_way += on_cpu[: len(on_cpu) - CPU_GROUPS + 1]
    for other in in_the_way:
        group = _groups.pop(other)
        group.close(wait=False)
        _ending.append(group)
    _await_end_of([old for old in _ending if _holds_up(old.config, config)], check)
    _groups[config] = WorkerGroup(config, port)
    return _groups[config]


def _holds_up(ending: GroupConfig, config: GroupConfig) -> bool:
    """Whether a group that ends has to be gone before another starts: the memory that it holds is needed."""
    both_on_cpu = ending.devices.kind == config.devices.kind == "cpu"
    return both_on_cpu or ending == config or ending.conflicts(config)


def _await_end_of(ending: list[WorkerGroup], check: Check) -> None:
    until = time.monotonic() + ENDING_SECONDS
    for old in ending:
        while not old.ended(POLL_SECONDS):
            check()
            if time.monotonic() > until:
                where = ", ".join(old.config.devices.visible)
                raise WorkersFailedError(
                    f"processes of an earlier group{where and f' on GPU {where}'} have been killed and have not ended "
                    f"for {ENDING_SECONDS:.0f} s: the driver holds them. Name other GPUs in the layout's 'devices'; "
                    "'nvidia-smi --gpu-reset', or starting this machine again, gives these back"
                )
    _ending[:] = [old for old in _ending if not old.ended()]


def find_group(config: GroupConfig) -> WorkerGroup | None:
    """The group of a configuration, in whatever state it is."""
    return _groups.get(config)


def find_model(config: ModelConfig) -> RemoteModel | None:
    """The model of a configuration if it is loaded and its group is up."""
    group = _groups.get(config.group)
    model = None if group is None else group.models.get(config)
    return model if model is not None and model.ready else None


def add_user(config: ModelConfig) -> None:
    """Somebody refers to a model, loaded or not."""
    global _housekeeper
    with _users_lock:
        _users[config] += 1
        if _housekeeper is None or not _housekeeper.is_alive():  # a forked child has none
            _housekeeper = threading.Thread(target=_keep_house, name="users of models", daemon=True)
            _housekeeper.start()


def remove_user(config: ModelConfig) -> None:
    """Somebody refers to a model no longer. Safe to call from a finalizer, at any time and in any thread.

    A model without users stays until its room is needed: the next graph may ask for it again. One whose device memory
    was asked back is freed for good.
    """
    _released.put(config)
    _wake.put(None)


def _is_used(config: ModelConfig) -> bool:
    """Whether anybody refers to a model."""
    with _users_lock:
        while not _released.empty():  # only who has the lock takes anything
            released = _released.get()
            _users[released] -= 1
            if _users[released] <= 0:
                del _users[released]
        return _users[config] > 0


def _keep_house() -> None:
    """Free models that nobody refers to any more, and whose memory was asked back."""
    while True:
        _wake.get()
        try:
            for unused in [other for group in list(_groups.values()) for other in list(group.models)]:
                _unload_unused(unused)
        except Exception:
            log.exception("freeing a model that nobody refers to")


def _unload_unused(config: ModelConfig) -> None:
    group, model = find_group(config.group), find_model(config)
    if group is None or model is None or not model.offloaded or _is_used(config):
        return
    with group.lock:
        if model.offloaded and not _is_used(config):
            with contextlib.suppress(WorkersFailedError, RequestFailedError):  # then it is freed all the same
                group.unload(config)


def close_groups() -> int:
    """End every group; how many there were."""
    with _groups_lock:
        count = len(_groups)
        _ending.extend(_groups.values())
        _groups.clear()
        for group in _ending:
            group.close(wait=False)  # all at once
        with contextlib.suppress(WorkersFailedError):  # who needs their memory says so
            _await_end_of(list(_ending), lambda: None)
        return count


def _forget_groups() -> None:
    # A forked child has neither the parent's ranks nor the right to end them, nor to keep them alive. It has none of
    # its threads, either, of which one may have held a lock.
    global _groups_lock, _users_lock, _released, _wake
    _groups_lock, _users_lock = threading.RLock(), threading.Lock()
    _released, _wake = queue.SimpleQueue(), queue.SimpleQueue()
    for group in _groups.values():
        group.forget()
    _groups.clear()


atexit.register(close_groups)
if hasattr(os, "register_at_fork"):  # not on Windows, where the pack still loads and says that it needs Linux
    os.register_at_fork(after_in_child=_forget_groups)
