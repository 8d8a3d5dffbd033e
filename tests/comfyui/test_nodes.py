"""What a user reads of the nodes: descriptions, tooltips, help pages, categories, and the list of pipelines."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from parallel_backend.cache.config import PRESETS

from .server import CHECKOUT, PACK_NAME, ComfyServer
from .test_workflow_formats import DYNAMIC_COMBO

NODES = {
    "HybridDiT_ParallelLayout": "Parallel Layout",
    "HybridDiT_LoadPipeline": "Load Pipeline (Parallel)",
    "HybridDiT_LoadDiffusionModel": "Load Diffusion Model (Parallel)",
    "HybridDiT_LoadCLIP": "Load CLIP (Parallel)",
    "HybridDiT_LoadVAE": "Load VAE (Parallel)",
    "HybridDiT_LoadCheckpoint": "Load Checkpoint (Parallel)",
    "HybridDiT_BlockCache": "Block Cache",
    "HybridDiT_WorkersReport": "Workers Report",
    "HybridDiT_UnloadWorkers": "Unload Workers",
}
"""Node id -> name on the node. Both are in users' workflows and habits: a change here breaks those."""


@pytest.fixture(scope="module")
def definitions(server: ComfyServer) -> dict[str, Any]:
    """The pack's nodes as the frontend gets them."""
    return {key: node for key, node in server.object_info().items() if key.startswith("HybridDiT_")}


def test_loading_the_pack_imports_nothing_else_and_starts_nothing(server: ComfyServer, home: Path):
    notes = (home / "load.log").read_text().splitlines()
    own = [note for note in notes if note.startswith("import ") and f"/{PACK_NAME}." in note]
    assert any(note.endswith(".runtime.client") for note in own)
    assert notes == own


def inputs_of(node: dict[str, Any]) -> dict[str, list]:
    """What a user can set or connect, also what a choice opens: not the hidden ones."""
    found: dict[str, list] = {}
    for group in ("required", "optional"):
        for name, spec in node["input"].get(group, {}).items():
            found[name] = spec
            if spec[0] == DYNAMIC_COMBO:
                for option in spec[1]["options"]:
                    found |= inputs_of({"input": option["inputs"]})
    return found


def test_the_nodes(definitions):
    assert {key: node["display_name"] for key, node in definitions.items()} == NODES
    assert {node["category"] for node in definitions.values()} == {"model/loaders/parallel"}
    assert {node["python_module"] for node in definitions.values()} == {f"custom_nodes.{PACK_NAME}"}


def test_loaders_are_found_by_the_families_that_they_load(definitions):
    found = {key: set(node["search_aliases"]) for key, node in definitions.items()}
    folders = {"flux.2 parallel", "qwen image parallel"}
    assert folders | {"z image parallel"} <= found["HybridDiT_LoadDiffusionModel"]
    assert folders <= found["HybridDiT_LoadPipeline"]
    assert "z image parallel" not in found["HybridDiT_LoadPipeline"]


@pytest.mark.parametrize("node_id", NODES)
def test_everything_is_described(node_id, definitions):
    node = definitions[node_id]
    assert len(node["description"]) > 20
    assert {"hybrid dit", "distributed", "sequence parallel"} <= set(node["search_aliases"])
    inputs = inputs_of(node)
    assert inputs
    for name, spec in inputs.items():
        assert len(spec) > 1, f"{name} has no tooltip"
        assert spec[1].get("tooltip"), f"{name} has no tooltip"
    assert node["output"]
    assert len(node["output_tooltips"]) == len(node["output"])
    assert all(node["output_tooltips"])


@pytest.mark.parametrize("node_id", NODES)
def test_help_page(node_id, definitions, server):
    page = CHECKOUT / "web" / "docs" / f"{node_id}.md"
    text = page.read_text()
    assert server.request(f"/extensions/{PACK_NAME}/docs/{urllib.parse.quote(node_id)}.md").decode() == text
    assert text.startswith(f"# {NODES[node_id]}\n")
    whole = text.replace("`<wbr>`", "")  # where a long name may be broken
    missing = [name for name in inputs_of(definitions[node_id]) if not re.search(rf"`{re.escape(name)}`", whole)]
    assert not missing
    # The info panel is 272 pixels wide and cuts tables off.
    assert not re.search(r"^\|", text, re.MULTILINE)


def test_no_help_page_without_a_node():
    assert {page.stem for page in (CHECKOUT / "web" / "docs").glob("*.md")} == set(NODES)


def test_pipelines_are_listed(definitions):
    kind, options = inputs_of(definitions["HybridDiT_LoadPipeline"])["pipeline"]
    # A definition gives a combo's values in the place of its type, or (newer) among its options.
    values = kind if isinstance(kind, list) else options["options"]
    assert {"flux2-demo", "tiny"} <= set(values)


def test_defaults_are_small(definitions):
    # What a new node does on any machine: the fastest of its devices. That switch stands first.
    node = definitions["HybridDiT_ParallelLayout"]
    defaults = {name: spec[1]["default"] for name, spec in inputs_of(node).items()}
    options = {"nnodes": 1, "rdzv_endpoint": "", "compile": False, "cuda_graphs": False, "copy_engines": False}
    assert defaults == {"auto": True, "ulysses": 1, "ring": 1, "tp": 1, "devices": "auto", **options}
    assert (node["input_order"]["required"], node["input_order"]["optional"]) == ([], list(defaults))


def test_automatic_cannot_be_taken_for_automatic_devices(definitions):
    inputs = inputs_of(definitions["HybridDiT_ParallelLayout"])
    switch, devices = inputs["auto"][1], inputs["devices"][1]
    assert (switch["display_name"], switch["label_on"], switch["label_off"]) == ("layout", "automatic", "set below")
    assert "auto" not in devices.get("display_name", "devices")
    assert "Which devices there are" in devices["tooltip"]


def test_block_cache_starts_from_the_first_preset(definitions):
    inputs = inputs_of(definitions["HybridDiT_BlockCache"])
    defaults = {name: spec[1].get("default") for name, spec in inputs.items() if name not in ("model", "preset")}
    order = PRESETS["quality"].calibrator.taylorseer_order
    off = {"max_accumulated_residual_diff_threshold": 0.0, "steps_computation_mask": "", "taylorseer_order": order}
    config = asdict(PRESETS["quality"].config)
    del config["num_inference_steps"]  # a sampler's call says it
    assert defaults == config | off
    assert [option["key"] for option in inputs["preset"][1]["options"]] == [*PRESETS, "custom"]
