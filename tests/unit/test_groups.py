"""Who refers to a model: counted rightly whatever finalizers, threads and forks do."""

from __future__ import annotations

import os
import threading

import pytest

from parallel_backend.runtime.client import groups
from parallel_backend.runtime.client.groups import add_user, remove_user


class Config:
    """Stands for a configuration; ``armed`` has somebody let go of it in the middle of the next use of a table."""

    def __init__(self) -> None:
        self.armed = 0

    def __hash__(self) -> int:
        self.armed -= 1
        if self.armed == 0:
            remove_user(self)  # as a finalizer that garbage collection runs here
        return id(self)


@pytest.fixture
def config():
    config = Config()
    yield config
    while groups._is_used(config):
        remove_user(config)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_finalizer_in_the_middle_of_counting(config, moment):
    add_user(config)
    add_user(config)
    config.armed = moment
    add_user(config)
    config.armed = 0
    assert groups._is_used(config)
    remove_user(config)
    assert groups._is_used(config)
    remove_user(config)
    assert not groups._is_used(config)


def test_many_threads(config):
    def use() -> None:
        for _ in range(2000):
            add_user(config)
            remove_user(config)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not groups._is_used(config)


def test_a_forked_child_waits_for_no_lock_that_nobody_gives_back(config):
    add_user(config)
    with groups._users_lock, groups._groups_lock:
        child = os.fork()
        if child == 0:
            signals = threading.Timer(5, lambda: os._exit(1))
            signals.daemon = True
            signals.start()
            add_user(config)
            with groups._groups_lock:
                os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
