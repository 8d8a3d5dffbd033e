"""Each workflow ships twice, as the UI saves it and as /prompt takes it, with a picture: the two have to agree."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from PIL import Image

from .server import CHECKOUT, ComfyServer
from .template_models import all_nodes
from .test_templates import fetch_template

FOLDER = CHECKOUT / "workflows"
API_FOLDER = FOLDER / "api"
ALL = sorted({file.stem for folder in (FOLDER, API_FOLDER) for file in folder.glob("*.json")})

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
"""A combo whose choice decides which widgets follow it; theirs are named after it, with a dot."""
NOTES = {"Note", "MarkdownNote"}
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
MODE_ALWAYS = 0
TITLE = 30
"""Height of a node's title, which is above its position."""
OPENED = 420
"""More than what Block Cache grows by with the preset "custom": eleven fields, of 24 pixels and some gaps."""


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


@pytest.mark.parametrize("name", ALL)
def test_formats_agree(name, definitions):
    ui = json.loads((FOLDER / f"{name}.json").read_text())
    api = json.loads((API_FOLDER / f"{name}.json").read_text())
    # "_meta" holds titles for people.
    expected = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api.items()}
    assert to_api(ui, definitions) == expected


@pytest.mark.parametrize("name", ALL)
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
    """As ComfyUI's template browser asks for it."""
    picture = FOLDER / f"{name}.jpg"
    assert picture.stat().st_size < 60_000
    with Image.open(picture) as image:
        image.load()
        assert min(image.size) >= 128


@pytest.mark.parametrize("name", ALL)
def test_nodes_can_be_read(name):
    """Nothing lies over a node or its title, also where Block Cache opens its fields; and it opens large enough."""
    ui = json.loads((FOLDER / f"{name}.json").read_text())
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in ui["nodes"]}
    for node in ui["nodes"]:
        if node["type"] == "HybridDiT_BlockCache":
            x, y, width, height = boxes[node["id"]]
            boxes[node["id"]] = (x, y, width, height + OPENED)
    for a, b in itertools.combinations(boxes, 2):
        (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[a], boxes[b]
        apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by - TITLE or by + bh <= ay - TITLE
        assert apart, f"nodes {a} and {b} overlap"
    assert ui["extra"]["ds"]["scale"] >= 0.7


MODEL_INPUTS = ("unet_name", "clip_name", "vae_name")
TEMPLATES = ("image_flux2_fp8", "image_qwen_image", "image_qwen_Image_2512", "image_qwen_image_edit_2511",
             "image_z_image_turbo", "image_flux2_klein_text_to_image", "video_wan2_2_14B_t2v")  # fmt: skip
"""ComfyUI's own, which name the same files."""


def test_files_can_be_downloaded(server: ComfyServer):
    """Each loader says where its file is to be had, in the words of ComfyUI's templates."""
    known = [model for name in TEMPLATES for model in models_of_ui(fetch_template(server, name))]
    found = []
    for name in ALL:
        ui, api = (json.loads((folder / f"{name}.json").read_text()) for folder in (FOLDER, API_FOLDER))
        named = [value for node in api.values() for key, value in node["inputs"].items() if key in MODEL_INPUTS]
        models = models_of_ui(ui)
        assert sorted(model["name"] for model in models) == sorted(named)
        assert [model for model in models if model not in known] == []
        found += models
    assert len(found) == 25


def models_of_ui(workflow: dict[str, Any]) -> list[dict[str, str]]:
    return [model for node in all_nodes(workflow) for model in node.get("properties", {}).get("models", [])]


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
