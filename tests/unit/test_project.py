"""The project's own files agree with each other, and imports go in one direction."""

from __future__ import annotations

import ast
import builtins
import sys
from pathlib import Path

import pytest

import parallel_backend

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 for tomllib")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_modules(file: Path) -> set[str]:
    """Top-level names of all absolute imports in a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_requirements_name_nothing_that_pip_could_change():
    # One line of it would do: ComfyUI-Manager hands them to pip one by one.
    assert all(line.startswith("#") for line in (ROOT / "requirements.txt").read_text().splitlines())


def test_versions_agree():
    assert PROJECT["project"]["version"] == parallel_backend.__version__


def test_every_dependency_is_used_and_every_import_declared():
    declared = {dependency.split(">")[0].replace("-", "_") for dependency in PROJECT["project"]["dependencies"]}
    used = set().union(*(imported_modules(file) for file in (ROOT / "parallel_backend").rglob("*.py")))
    # torch brings Triton along wherever it has a GPU to compile for, and only then is it imported.
    provided = {"PIL": "pillow", "tokenizers": "transformers", "yaml": "pyyaml", "triton": "torch"}
    foreign = {provided.get(name, name) for name in used - set(sys.stdlib_module_names) - {"parallel_backend"}}
    # diffusers and transformers read files with safetensors, and each of them takes any. ComfyUI brings its own library
    # of number formats along, which is imported where a model needs it (`kitchen`), of whatever version it is.
    assert foreign - {"comfy_kitchen"} == declared - {"safetensors"}
    assert "comfy-kitchen" in PROJECT["project"]["optional-dependencies"]["dev"]


def test_nodes_import_the_library_by_its_place_in_the_pack():
    # ComfyUI has a module called "nodes" too, and the pack need not be installed.
    for file in (ROOT / "nodes").rglob("*.py"):
        assert not imported_modules(file) & {"parallel_backend", "nodes"}, file


def test_comfyui_metadata():
    tool = PROJECT["tool"]["comfy"]
    assert tool["DisplayName"]
    assert tool["PublisherId"]
    assert "comfyui" not in PROJECT["project"]["name"].lower()
    assert (ROOT / PROJECT["project"]["license-files"][0]).read_text().count("Apache License") >= 1


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "add_routes",
    # PyTorch's own way to send objects between ranks is a pickle.
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
}  # fmt: skip


def python_files() -> list[Path]:
    """All of the pack's own code."""
    return [
        ROOT / "__init__.py",
        ROOT / "stand_ins.py",
        *(ROOT / "nodes").rglob("*.py"),
        *(ROOT / "parallel_backend").rglob("*.py"),
    ]


def test_what_security_md_promises():
    for file in python_files():
        assert not imported_modules(file) & FORBIDDEN_MODULES, file
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                # A method may share the name of a builtin function, as torch.compile and re.compile do.
                assert name not in FORBIDDEN_CALLS, f"{where}: {name}"
                assert name.rpartition(".")[2] not in FORBIDDEN_CALLS - vars(builtins).keys(), f"{where}: {name}"
                # The root logger is ComfyUI's; only the command line has one of its own.
                assert not name.endswith("basicConfig") or file.parent.name == "cli", where
                assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{where}: {name}"
            # ComfyUI's packs add routes by decorators of PromptServer.instance.routes.
            assert not (isinstance(node, ast.Attribute) and node.attr == "routes"), where
