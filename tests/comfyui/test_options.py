"""All that ComfyUI reads from a MODEL is in the table of docs/comfyui_nodes.md, and the pack does as it says."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from types import ModuleType

import pytest

from .comfy_sources import (
    apply_model_arguments,
    kinds_of,
    options_read,
    patcher_attributes,
    patcher_setters,
)
from .graphs import Graph, add_loader, add_reference, add_sampler, run_well, save_latent
from .server import CHECKOUT

TREATMENTS = {"honoured", "refused", "in the log", "nothing to do"}
TABLES = {
    "transformer_options": "`transformer_options`",
    "model_options": "`model_options`",
    "patcher": "What a ModelPatcher carries",
    "apply_model": "Arguments of `apply_model`",
    "kinds": "Wrappers and callbacks",
}
"""Headings of the page."""


def tables(text: str) -> dict[str, dict[str, str]]:
    """``{heading: {key: what becomes of it}}`` of a page."""
    found: dict[str, dict[str, str]] = {}
    for section in text.split("\n## ")[1:]:
        heading, _, body = section.partition("\n")
        rows = [line.split("|")[1:3] for line in body.splitlines() if line.startswith("| `")]
        found[heading] = {key: treatment.strip() for keys, treatment in rows for key in re.findall(r"`(\w+)`", keys)}
    return found


@pytest.fixture(scope="module")
def documented() -> dict[str, dict[str, str]]:
    found = tables((CHECKOUT / "docs" / "comfyui_nodes.md").read_text())
    return {name: found[heading] for name, heading in TABLES.items()}


@pytest.fixture(scope="module")
def pack() -> ModuleType:
    """``nodes/model_options.py``, which needs no ComfyUI."""
    spec = importlib.util.spec_from_file_location("model_options", CHECKOUT / "nodes" / "model_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missing(read: Mapping[str, object] | set[str] | list[str], table: Mapping[str, str]) -> dict[str, object]:
    return {key: read[key] if isinstance(read, Mapping) else "" for key in read if key not in table}


def test_every_option_that_comfyui_reads_is_in_the_table(comfyui, documented):
    for name, read in options_read(comfyui).items():
        assert len(read) > 20, "the sources are written otherwise, and nothing was found"
        assert not missing(read, documented[name]), name


def test_all_that_a_patcher_carries_is_in_the_table(comfyui, documented):
    attributes, setters = patcher_attributes(comfyui), patcher_setters(comfyui)
    assert {"patches", "injections", "forced_hooks"} <= attributes
    assert {"set_model_patch", "add_object_patch", "disable_model_cfg1_optimization"} <= setters
    assert not missing(attributes | setters, documented["patcher"])
    assert not missing(apply_model_arguments(comfyui), documented["apply_model"])
    kinds = kinds_of(comfyui, "WrappersMP") | kinds_of(comfyui, "CallbacksMP")
    assert {"diffusion_model", "on_clone"} <= kinds
    assert not missing(kinds, documented["kinds"])


def test_the_table_and_the_pack_agree(documented, pack):
    words = {pack.HONOURED: "honoured", pack.REFUSED: "refused", pack.LOGGED: "in the log"}
    words[pack.NOTHING] = "nothing to do"
    for name, table in (("transformer_options", pack.TRANSFORMER_OPTIONS), ("model_options", pack.MODEL_OPTIONS)):
        assert {key: words[treatment] for key, treatment in table.items()} == documented[name]
    assert {treatment for table in documented.values() for treatment in table.values()} == TREATMENTS


SOURCE = """
class Block:
    def forward(self, x, transformer_options={}):
        if "newest_key" in transformer_options:
            x = transformer_options["newest_key"](x)
        patches = transformer_options.get("patches", {})
        return x

def sample(model, extra_args):
    model_options = model.model_options.copy()
    to = model_options["transformer_options"]
    to["by_another_name"] = extra_args.get("model_options", {}).pop("third_key", None)
"""


def test_a_key_that_a_newer_comfyui_has_is_found(comfyui, documented, tmp_path):
    """By whatever name the code calls the options, in whatever way it reads the key."""
    for folder in ("comfy", "comfy_extras", "comfy_api"):
        (tmp_path / folder).mkdir()
    (tmp_path / "nodes.py").write_text(SOURCE)
    read = options_read(tmp_path)
    assert set(missing(read["transformer_options"], documented["transformer_options"])) == {
        "newest_key", "by_another_name",
    }  # fmt: skip
    assert set(missing(read["model_options"], documented["model_options"])) == {"third_key"}
    patcher = (comfyui / "comfy" / "model_patcher.py").read_text()
    changed = patcher.replace("        self.patches = {}\n", "        self.patches = self.newest = {}\n", 1)
    (tmp_path / "comfy" / "model_patcher.py").write_text(changed.replace("def add_patches(", "def set_newest("))
    assert set(missing(patcher_attributes(tmp_path), documented["patcher"])) == {"newest"}
    assert set(missing(patcher_setters(tmp_path), documented["patcher"])) == {"set_newest"}


LISTEN = """
import comfy.patcher_extension as extension
calls = torch.__dict__.setdefault("_calls_of_a_probe", {}).setdefault(NAME, [])
kinds = [v for k, v in vars(extension.CallbacksMP).items() if k.startswith("ON_")]
for kind in kinds:
    m.add_callback_with_key(kind, "probe", lambda *_, kind=kind, calls=calls: calls.append(kind))
for kind in [v for k, v in vars(extension.WrappersMP).items() if k.isupper()]:
    def wrapper(executor, *args, kind=kind, calls=calls, **kwargs):
        calls.append(kind)
        return executor(*args, **kwargs)
    m.add_wrapper_with_key(kind, "probe", wrapper)
m.set_attachments("probe", calls)
m.set_additional_models("probe", [m.clone()])
"""


def test_callbacks_wrappers_and_attachments_are_called_as_by_stock(server):
    graph = Graph()
    for name, add in (("ours", lambda g: add_loader(g, ulysses=1, tp=1)), ("stock", add_reference)):
        loader = add(graph)
        probe = graph.add("ReferenceChange", model=(loader, 0), statements=LISTEN.replace("NAME", repr(name)))
        # A node behind it: what a clone carries is carried on.
        model = graph.add("CFGNorm", model=probe, strength=1.0)
        save_latent(graph, add_sampler(graph, loader, model=model, seed=77))
    run_well(server, graph)
    graph = Graph()
    look = graph.add("ReferenceLook", model=add_reference(graph), expression="torch._calls_of_a_probe")
    (text,) = run_well(server, graph).outputs[str(look)]["text"]
    calls = ast.literal_eval(text)
    assert {"on_clone", "on_pre_run", "outer_sample", "predict_noise", "diffusion_model"} <= set(calls["stock"])
    # When a model leaves its device, and comes back, is up to what else is there.
    apart = ("on_load_after", "on_detach_after")
    ours, stock = ([call for call in calls[name] if call not in apart] for name in ("ours", "stock"))
    assert ours == stock
