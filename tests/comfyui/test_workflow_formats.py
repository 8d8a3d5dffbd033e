"""Each workflow ships twice, as the UI saves it and as /prompt takes it, with a picture: the two have to agree."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from .server import CHECKOUT, ComfyServer

FOLDER = CHECKOUT / "workflows"
API_FOLDER = FOLDER / "api"
ALL = sorted({file.stem for folder in (FOLDER, API_FOLDER) for file in folder.glob("*.json")})
NAMES = [name for name in ALL if name.startswith("flux2")]
"""The others have subgraphs, which the front end itself has to flatten: see test_qwen_templates."""

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
"""A combo whose choice decides which widgets follow it; theirs are named after it, with a dot."""
NOTES = {"Note", "MarkdownNote"}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
MODE_ALWAYS = 0


def to_api(ui: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """What the frontend queues for a UI workflow without subgraphs, reroutes and bypassed nodes.

    Args:
        ui: the workflow as the UI saves it.
        definitions: the server's /object_info.
    """
    origins = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _inputs(node, definitions[node["type"]], origins)}
        for node in ui["nodes"]
        if node["type"] not in NOTES
    }


def _inputs(node: dict[str, Any], definition: dict[str, Any], origins: dict[int, list]) -> dict[str, Any]:
    assert node.get("mode", MODE_ALWAYS) == MODE_ALWAYS, f"node {node['id']} is muted or bypassed"
    links = {slot["name"]: origins[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
    inputs: dict[str, Any] = {}
    values = list(node.get("widgets_values") or [])
    specs = _specs(definition)
    while specs:
        name, spec = specs.pop(0)
        options = spec[1] if len(spec) > 1 else {}
        if _is_widget(spec[0], options):
            assert values, f"node {node['id']} ({node['type']}) has no value for {name}"
            inputs[name] = values.pop(0)
            # Widgets that the frontend adds behind an input's own.
            if options.get("control_after_generate"):
                assert values.pop(0) in CONTROLS
            if options.get("image_upload"):
                assert values.pop(0) == "image"
            if spec[0] == DYNAMIC_COMBO:
                (chosen,) = (option for option in options["options"] if option["key"] == inputs[name])
                specs[:0] = [
                    (f"{name}.{inner}", spec) for group in chosen["inputs"].values() for inner, spec in group.items()
                ]
        if name in links:
            inputs[name] = links.pop(name)
    assert not links, f"node {node['id']} ({node['type']}) has links to inputs that do not exist: {sorted(links)}"
    assert not values, f"node {node['id']} ({node['type']}) has values of no input: {values}"
    return inputs


def _specs(definition: dict[str, Any]) -> list[tuple[str, list]]:
    return [
        (name, definition["input"][group][name])
        for group in ("required", "optional")
        for name in definition["input_order"].get(group, [])
    ]


def _is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGET_TYPES | {DYNAMIC_COMBO}) and not options.get("forceInput")


@pytest.fixture(scope="module")
def definitions(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


@pytest.mark.parametrize("name", NAMES)
def test_formats_agree(name, definitions):
    ui = json.loads((FOLDER / f"{name}.json").read_text())
    api = json.loads((API_FOLDER / f"{name}.json").read_text())
    # "_meta" holds titles for people.
    expected = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api.items()}
    assert to_api(ui, definitions) == expected


@pytest.mark.parametrize("name", NAMES)
def test_links_are_noted_at_both_ends(name):
    ui = json.loads((FOLDER / f"{name}.json").read_text())
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert ui["last_node_id"] >= max(nodes)
    assert ui["last_link_id"] >= max(link[0] for link in ui["links"])
    for link, origin, origin_slot, target, target_slot, kind in ui["links"]:
        out, into = nodes[origin]["outputs"][origin_slot], nodes[target]["inputs"][target_slot]
        assert link in out["links"]
        assert into["link"] == link
        assert out["type"] in (kind, "*")


@pytest.mark.parametrize("name", ALL)
def test_picture_beside_it(name):
    pictures = [file for file in FOLDER.glob(f"{name}.*") if file.suffix in (".jpg", ".jpeg", ".png", ".webp")]
    assert len(pictures) == 1
    with Image.open(pictures[0]) as picture:
        picture.load()
        assert min(picture.size) >= 128


def one_node(widgets: list, kind: str) -> dict[str, Any]:
    """A one-node UI workflow, for the converter's own tests."""
    return {"nodes": [{"id": 1, "type": kind, "mode": 0, "inputs": [], "widgets_values": widgets}], "links": []}


def test_converter_opens_a_dynamic_combo(definitions):
    kind = "HybridDiT_BlockCache"
    assert to_api(one_node(["speed"], kind), definitions)["1"]["inputs"] == {"preset": "speed"}
    values = [2, 1, 0.5, 3, 1, -1, -1, 0.0, 0, "", "static"]
    inputs = to_api(one_node(["custom", *values], kind), definitions)["1"]["inputs"]
    assert list(inputs.values()) == ["custom", *values]
    assert inputs["preset.Fn_compute_blocks"] == 2
    with pytest.raises(AssertionError, match="values of no input"):
        to_api(one_node(["speed", 2], kind), definitions)


def test_converter_sees_differences(definitions):
    """Proof that the comparison can fail: of values, of their number, of links and of muted nodes."""
    good = one_node([7, "randomize"], "RandomNoise")
    assert to_api(good, definitions) == {"1": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}}}
    assert to_api(one_node([8, "fixed"], "RandomNoise"), definitions) != to_api(good, definitions)
    for bad in ([7], [7, "randomize", "more"], []):
        with pytest.raises((AssertionError, IndexError)):
            to_api(one_node(bad, "RandomNoise"), definitions)
    muted = one_node([7, "randomize"], "RandomNoise")
    muted["nodes"][0]["mode"] = 4
    with pytest.raises(AssertionError, match="bypassed"):
        to_api(muted, definitions)
