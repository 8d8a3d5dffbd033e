"""The session's one world of 8 gloo ranks. It ends with the tests of this folder: idle, its threads still wake up."""

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="package")
def world():
    world = World()
    yield world
    world.close()
