"""A ComfyUI server whose ranks take orders for faults, for the whole session."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from PIL.Image import Image

from tests.comfyui.conftest import EXAMPLE_IMAGE, REFERENCE_PACK, comfyui, example_image, home  # noqa: F401  (fixtures)
from tests.comfyui.server import ComfyServer, find_comfyui

from . import file_audit, injection
from .injection import Orders

HERE = Path(__file__).resolve().parent

# The same inputs each time in `make test` (short) and `make test-all`; the long form looks for new ones.
for name, count in (("short", 200), ("thorough", 500)):
    settings.register_profile(
        name, max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate]
    )
settings.register_profile("long", max_examples=3000, database=None, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
TEST_SECONDS = 180
STEP_DEADLINE = 4.0
"""Seconds; the tiny model's steps take a few hundredths of one."""
MESH_DEADLINE = 2.0
"""Seconds; the exchanges when a mesh is built take milliseconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Those that need no server come first: it starts meanwhile. Those that end it come last.
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[place] for place in places), key=lambda item: needs_server(item) + ends_server(item))
    for place, item in zip(places, ours, strict=True):
        items[place] = item
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


def needs_server(item: pytest.Item) -> bool:
    """Whether a test of this folder uses the session's server."""
    return "server" in getattr(item, "fixturenames", ())


def ends_server(item: pytest.Item) -> bool:
    """Whether a test of this folder ends the session's server."""
    return "doomed" in getattr(item, "fixturenames", ())


def faulty_server(comfyui: Path, home: Path, orders: Orders) -> ComfyServer:  # noqa: F811
    """A server whose ranks take orders, not started. It has a folder for temporary files of its own."""
    temporary = Path(tempfile.mkdtemp(prefix="faults-", dir=orders.folder))
    return ComfyServer(
        comfyui=comfyui,
        diffusers_folder=home / "models",
        packs=[REFERENCE_PACK],
        environment={
            "HYBRID_DIT_HOME": str(home),
            "HYBRID_DIT_STEP_DEADLINE": str(STEP_DEADLINE),
            "HYBRID_DIT_MESH_DEADLINE": str(MESH_DEADLINE),
            "HYBRID_DIT_TEST_HOOKS": os.pathsep.join([injection.__file__, file_audit.__file__]),
            injection.FOLDER: str(orders.folder),
            file_audit.LOG: str(orders.folder / "files.log"),
            file_audit.FORBIDDEN: str(home / "elsewhere"),
            "TMPDIR": str(temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(orders.folder / "inductor"),
        },
    )


@contextlib.contextmanager
def hangups_end_processes() -> Iterator[None]:
    """Those started meanwhile, as in a user's terminal: tests that run under nohup hand on that SIGHUP is ignored."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, inherited)


@pytest.fixture(scope="session")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Orders:
    """Where faults are ordered from the session's server."""
    return Orders(tmp_path_factory.mktemp("orders"))


@pytest.fixture(scope="session", autouse=True)
def _launched(request: pytest.FixtureRequest) -> Iterator[ComfyServer | None]:
    """The session's server, which other tests do not wait for; None where no test needs it."""
    ours = [item for item in request.session.items if HERE in item.path.parents]
    if find_comfyui() is None or not any(map(needs_server, ours)):
        yield None
        return
    server = faulty_server(*map(request.getfixturevalue, ("comfyui", "home", "orders")))
    with hangups_end_processes():
        server.launch()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def server(comfyui: Path, _launched: ComfyServer, example_image: Image) -> ComfyServer:  # noqa: F811
    """The session's server."""
    _launched.start()
    _launched.add_input_image(EXAMPLE_IMAGE, example_image)
    return _launched


@pytest.fixture(autouse=True)
def _no_order_is_left(orders: Orders) -> Iterator[None]:
    yield
    orders.withdraw()
