"""One server for all browser tests, which believes in as many GPUs as a test wants; ranks run on the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..comfyui import pretended_gpus
from ..comfyui.launch_server import HOOKS_VARIABLE
from ..comfyui.server import CHECKOUT, ComfyServer

EXAMPLE_IMAGE = CHECKOUT / "workflows" / "hybrid-dit-example.png"


class Gpus:
    """How many the server believes in, and the kind of links between them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(2)

    def set(self, count: int, links: str = pretended_gpus.NVLINK) -> None:
        self.file.write_text(f"{count} {links}")


@pytest.fixture(scope="session")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Gpus:
    return Gpus(tmp_path_factory.mktemp("pretended") / "gpus")


@pytest.fixture(scope="session")
def server(gpus: Gpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    environment = {
        "HYBRID_DIT_HOME": str(tmp_path_factory.mktemp("home")),
        HOOKS_VARIABLE: pretended_gpus.__file__,
        pretended_gpus.FILE: str(gpus.file),
    }
    with ComfyServer(environment=environment) as server:
        shutil.copy(EXAMPLE_IMAGE, server.input)
        yield server
