"""The session's world of 8 gloo ranks."""

import sys
from pathlib import Path

import pytest

# Ranks import what they run by name. The checkout is itself a package (ComfyUI loads it as one), so that pytest gives
# test modules names that begin with the checkout's folder, which no rank can import: helpers are imported by this path.
ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


@pytest.fixture(scope="session")
def world():
    from tests.distributed.world import World

    world = World()
    yield world
    world.close()
