"""The session's world of 8 gloo ranks."""

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world():
    world = World()
    yield world
    world.close()
