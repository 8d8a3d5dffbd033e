"""The order of floors: imports run one way, no two files import each other, and no file is too long to read."""

from __future__ import annotations

import ast
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
MOST_LINES = 400
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"}
FLOORS = (
    ("cli", "__main__"), ("drawing",), ("runtime.client",), ("runtime.hosts",), ("runtime.rank",), ("runtime",),
    ("runtime.wire",), ("bench",), ("planning",), ("lora", "parallelize"), ("loading",), ("families",),
    ("cache", "blocks"), ("parallel",), ("mesh",), ("machine",), ("config", "paths", "limits", "requirements"),
)  # fmt: skip
"""Of `parallel_backend`, from above; a file belongs to the longest of these that its name begins with."""


def modules() -> dict[str, Path]:
    """All modules of the library by their names in it."""
    root = CHECKOUT / "parallel_backend"
    files = sorted(root.rglob("*.py"))
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip("."): file
        for file in files
    }


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the library that a file imports, for type checkers, too."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(part for part in base if part)
            found |= {f"{target}.{one.name}" if f"{target}.{one.name}" in known else target for one in node.names}
    return found - {""}


def floor(name: str) -> int:
    fitting = [
        (len(one), number) for number, floor in enumerate(FLOORS) for one in floor if f"{name}.".startswith(f"{one}.")
    ]
    assert fitting, f"{name} belongs to no floor"
    return max(fitting)[1]


def test_imports_run_downwards_and_never_in_a_circle():
    known = modules()
    imports = {name: imported(name, file, known) for name, file in known.items() if name}
    upwards = [f"{a} -> {b}" for a, targets in imports.items() for b in targets if floor(a) > floor(b)]
    assert upwards == []
    left = dict(imports)
    while leaves := [name for name, targets in left.items() if not targets & left.keys() - {name}]:
        for name in leaves:
            del left[name]
    assert sorted(left) == []  # each of these imports another of them


def test_the_library_knows_nothing_of_comfyui():
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {one.partition(".")[0] for one in names} & {
                "comfy",
                "comfy_api",
                "folder_paths",
                "nodes",
                "server",
            }, name


def test_no_file_is_too_long_to_read():
    files = [
        file for folder in ("parallel_backend", "nodes", "web") for file in (CHECKOUT / folder).rglob("*.[pj][ys]")
    ]
    long = {file.name: lines for file in files if (lines := len(file.read_text().splitlines())) > MOST_LINES}
    assert len(files) > 150
    assert long == {}
