"""ComfyUI of other versions: from the least that is promised the demo is drawn.

Before, and where a package of ComfyUI's is too old, one line in the log and the nodes themselves say what to do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from parallel_backend.requirements import COMFYUI, REQUIRED
from tests.text_encoder_file import write_text

from .graphs import Graph, add_layout
from .releases import release
from .server import CHECKOUT, PACK_NAME, ComfyServer
from .test_errors import failure
from .test_nodes import NODES

DEMO = json.loads((CHECKOUT / "workflows" / "api" / "01_demo_text_to_image.json").read_text())


@pytest.fixture(scope="session")
def releases(comfyui, pytestconfig) -> Path:
    """Where older releases are kept, from one session to the next."""
    return pytestconfig.cache.mkdir("comfyui")


def pretend(folder: Path, name: str, version: str) -> str:
    """A value of PYTHONPATH with which Python takes a package to have this version, though it is another."""
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def said(server: ComfyServer) -> list[str]:
    """What the pack said in the log when it was loaded; ComfyUI had no trouble with it, and there is no traceback."""
    lines = server.log_text().splitlines()
    troubles = ("IMPORT FAILED", "Cannot import", "Error while calling", "Skip /")
    own = [line for line in lines if f"custom_nodes/{PACK_NAME}" in line]
    assert not [line for line in own if any(trouble in line for trouble in troubles)], own
    assert not [line for line in lines if line.lstrip().startswith("File ") and f"/{PACK_NAME}/" in line]
    return [line for line in lines if "Hybrid DiT" in line]


def refused(server: ComfyServer) -> str:
    """All of the pack's nodes are there, and a workflow that ran before ends at the first of them: what it says."""
    nodes = {key: node["display_name"] for key, node in server.object_info().items() if key.startswith("HybridDiT_")}
    assert nodes == NODES
    result = server.run(DEMO)
    assert result.error, "the demo ran"
    assert result.error["node_type"] in NODES
    return result.error["exception_message"].strip()


def test_an_older_comfyui_and_an_older_package_are_named_and_comfyui_goes_on(comfyui, releases, tmp_path):
    path = pretend(tmp_path / "old", "transformers", "4.57.6")
    with ComfyServer(comfyui=release(comfyui, "0.12.1", releases), environment={"PYTHONPATH": path}) as server:
        (line,) = said(server)
        assert f"ComfyUI 0.12.1 is too old ({COMFYUI} or newer is needed): update ComfyUI" in line
        assert f"transformers 4.57.6 is too old ({REQUIRED['transformers']} or newer is needed): " in line
        assert "bin/python -m pip install 'transformers>=5.0' diffusers==" in line
        assert refused(server) == line.partition("cannot run: ")[2]


@pytest.mark.thorough
@pytest.mark.parametrize("version", ["0.3.75", "0.9.2", "0.13.0"])
def test_each_kind_of_older_comfyui_says_what_is_needed(comfyui, releases, version):
    with ComfyServer(comfyui=release(comfyui, version, releases)) as server:
        (line,) = said(server)
        assert f"ComfyUI {version} is too old ({COMFYUI} or newer is needed): update ComfyUI" in line
        assert refused(server) == line.partition("cannot run: ")[2]


@pytest.mark.thorough
@pytest.mark.parametrize("version", [COMFYUI, "0.16.4", "0.22.0", "0.33.0"])
def test_each_comfyui_that_is_promised_draws(comfyui, releases, version):
    with ComfyServer(comfyui=release(comfyui, version, releases)) as server:
        assert not said(server)
        assert {key for key in server.object_info() if key.startswith("HybridDiT_")} == set(NODES)
        result = server.run(DEMO)
        assert result.error is None, result.error
        (picture,) = result.files()
        assert np.asarray(server.image(**picture).convert("RGB"), dtype=float).std() > 20  # shapes on a background


@pytest.mark.thorough
def test_a_comfyui_whose_tokenizer_needs_an_older_transformers(comfyui, releases):
    with ComfyServer(comfyui=release(comfyui, "0.22.0", releases)) as server:
        (server.models / "text_encoders").mkdir()
        write_text(server.models / "text_encoders" / "tiny_mistral.safetensors")
        graph = Graph()
        clip = graph.add(
            "HybridDiT_LoadCLIP", clip_name="tiny_mistral.safetensors", type="flux2", layout=add_layout(graph)
        )
        graph.add("PreviewAny", source=graph.add("CLIPTextEncode", text="a red circle", clip=clip))
        message = failure(server, graph, clip)
    assert re.search(
        r"tokenizer of FLUX\.2 does not work with transformers [\d.]+ \(.*\); update ComfyUI to 0\.32", message
    )
