"""What ComfyUI's sources read from a MODEL, found by reading them: keys of its options, attributes, arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("comfy", "comfy_extras", "comfy_api")
NAMES = ("transformer_options", "model_options")


def options_read(comfyui: Path) -> dict[str, dict[str, set[str]]]:
    """``{"transformer_options": {key: files}, "model_options": {key: files}}``: what is read or written by its name."""
    found: dict[str, dict[str, set[str]]] = {name: {} for name in NAMES}
    for file in _files(comfyui):
        for function in _scopes(ast.parse(file.read_text())):
            for name, key in _keys_in(function):
                found[name].setdefault(key, set()).add(str(file.relative_to(comfyui)))
    return found


def patcher_attributes(comfyui: Path) -> set[str]:
    """What ``ModelPatcher.__init__`` gives a patcher."""
    init = _method(comfyui, "comfy/model_patcher.py", "ModelPatcher", "__init__")
    targets = [t for node in ast.walk(init) if isinstance(node, (ast.Assign, ast.AnnAssign)) for t in _targets(node)]
    return {t.attr for t in targets if isinstance(t, ast.Attribute) and _called(t.value) == "self"}


def patcher_setters(comfyui: Path) -> set[str]:
    """Methods of ``ModelPatcher`` by which nodes change it."""
    patcher = _class(comfyui, "comfy/model_patcher.py", "ModelPatcher")
    methods = [node.name for node in patcher.body if isinstance(node, ast.FunctionDef)]
    return {name for name in methods if name.startswith(("set_", "add_", "disable_"))}


def apply_model_arguments(comfyui: Path) -> list[str]:
    """The arguments of ``BaseModel.apply_model``, without ``self``."""
    arguments = _method(comfyui, "comfy/model_base.py", "BaseModel", "apply_model").args
    more = [arguments.kwarg] if arguments.kwarg else []
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *more)][1:]


def kinds_of(comfyui: Path, name: str) -> set[str]:
    """The kinds of wrappers (``WrappersMP``) or callbacks (``CallbacksMP``)."""
    body = _class(comfyui, "comfy/patcher_extension.py", name).body
    values = [node.value for node in body if isinstance(node, ast.Assign)]
    return {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}


def _files(comfyui: Path) -> Iterator[Path]:
    yield comfyui / "nodes.py"
    for folder in FOLDERS:
        yield from sorted((comfyui / folder).rglob("*.py"))


def _class(comfyui: Path, file: str, name: str) -> ast.ClassDef:
    (found,) = (
        n for n in ast.parse((comfyui / file).read_text()).body if isinstance(n, ast.ClassDef) and n.name == name
    )
    return found


def _method(comfyui: Path, file: str, cls: str, name: str) -> ast.FunctionDef:
    body = _class(comfyui, file, cls).body
    (found,) = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    return found


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _scopes(module: ast.Module) -> Iterator[ast.AST]:
    """The functions of a module and the methods of its classes, each with what is in it, and what is in none."""
    for node in module.body:
        yield from node.body if isinstance(node, ast.ClassDef) else [node]


def _keys_in(scope: ast.AST) -> Iterator[tuple[str, str]]:
    """``(which options, key)`` of each place in a function that names a key, also by another name of the options."""
    aliases: dict[str, str] = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            meant = _options(node.value, aliases)
            if meant is not None:
                aliases[node.targets[0].id] = meant
    for node in ast.walk(scope):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr not in ("get", "pop", "setdefault"):
                continue
            owner, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            owner, key = node.comparators[0], node.left
        else:
            continue
        meant = _options(owner, aliases)
        if meant is not None and isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield meant, key.value


def _options(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """Which options an expression stands for."""
    name = _called(node)
    if name in NAMES:
        return name
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in NAMES:
        return node.slice.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "copy":
            return _options(node.func.value, aliases)
        first = node.args[0] if node.args else None
        if node.func.attr in ("get", "setdefault") and isinstance(first, ast.Constant) and first.value in NAMES:
            return str(first.value)
    return None


def _called(node: ast.expr) -> str:
    """The last part of a name: ``transformer_options`` of ``self.transformer_options``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
