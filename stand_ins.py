"""What ComfyUI gets where the pack cannot run: nodes of the same names, each of which says why when it is run.

Most people never see ComfyUI's log; an old workflow, or a template, tells them here what the one line there says. These
are nodes of ComfyUI's first kind, which every ComfyUI takes, and nothing of ComfyUI is imported for them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .parallel_backend.requirements import REQUIRED, Problem, comfyui_problem, installed, one_line, problems

HELP = Path(__file__).resolve().parent / "web" / "docs"
"""A page a node, called as the node's id is, and headed by its name."""
OUTPUTS = 3
"""As many as the node with most has, so that what is linked in a workflow stays linked."""


def what_is_wrong() -> str:
    """Why the pack cannot run in this ComfyUI, in one line with what to do; empty if it can."""
    found: list[Problem] = []
    if "folder_paths" in sys.modules:  # else nobody's ComfyUI: a test, or a tool, imports the pack
        problem = comfyui_problem(getattr(sys.modules.get("comfyui_version"), "__version__", None))
        found += [problem] if problem else []
    found += problems({name: installed(name) for name in REQUIRED})
    return one_line(found)


def stand_ins(wrong: str) -> tuple[dict[str, type], dict[str, str]]:
    """ComfyUI's mappings of node ids to classes and to names, for all nodes of the pack."""
    names = {page.stem: page.read_text(encoding="utf-8").partition("\n")[0].strip("# ") for page in HELP.glob("*.md")}
    return {node: _stand_in(node, wrong) for node in names}, names


class _Any(str):
    """ComfyUI compares the types of what is linked by ``!=``: this one fits all."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def _stand_in(node: str, wrong: str) -> type:
    def run(self: Any, **inputs: Any) -> None:
        raise RuntimeError(wrong)

    described: dict[str, Any] = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
        "RETURN_TYPES": (_Any("*"),) * OUTPUTS,
        "OUTPUT_NODE": True,  # so that also a graph that ends in it is run, and says so
        "FUNCTION": "run",
        "CATEGORY": "model/loaders/parallel",
        "DESCRIPTION": f"Cannot run here: {wrong}",
        "run": run,
    }
    return type(node, (), described)
