"""A small FLUX.2 pipeline folder for the unit tests, and a home of their own."""

from pathlib import Path

import pytest

from parallel_backend.loading import weight_loader
from parallel_backend.loading.file_reader import FileReader
from tests.tiny_pipeline import make_tiny_pipeline


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory):
    """Nothing is written to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_DIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A pipeline folder, shared by all tests: not to be changed."""
    return make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """The bytes of each read of weights."""
    found: list[int] = []

    class Counted(FileReader):
        def read(self, part, into):
            super().read(part, into)
            found.append(part.nbytes)

    monkeypatch.setattr(weight_loader, "FileReader", Counted)
    return found
