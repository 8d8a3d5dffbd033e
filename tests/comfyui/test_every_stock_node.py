"""Each of ComfyUI's own nodes that takes a MODEL, a CLIP or a VAE, behind this pack's loader and behind ComfyUI's own.

Either both draw the same, or the error has the node and the remedy; there is no third way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.errors import relative_error

from .graphs import run_well, saved_latent
from .qwen_models import PIPELINE
from .server import CHECKOUT, ComfyServer
from .stock_nodes import NodeGraph, Outcome, outcome, takers, write_files
from .test_model import TOLERANCE

REMEDY = re.compile(r"bypass|[Dd]isconnect|\buse\b|choose|remove|load a checkpoint|update ComfyUI|connect")
PIPELINES = {"MODEL": "tiny", "CLIP": PIPELINE, "VAE": PIPELINE}
"""Of Qwen-Image all three are ComfyUI's own; a FLUX.2 has more of what nodes for a MODEL look for."""
EQUAL, REFUSED, STOCK_FAILS = "equal", "refused", "stock fails"


@pytest.fixture(scope="module")
def info(server: ComfyServer) -> dict[str, Any]:
    write_files(server)
    return server.object_info()


def documented(kind: str) -> tuple[set[str], dict[str, int]]:
    """The nodes that docs/comfyui_nodes.md says are refused, and how many it says do what."""
    page = (CHECKOUT / "docs" / "comfyui_nodes.md").read_text()
    section = page.partition("## ComfyUI's own nodes")[2]
    (row,) = [line for line in section.splitlines() if line.startswith(f"| {kind} |")]
    nodes, same, failing = map(int, re.findall(r"\| (\d+) (?=\|)", row))
    refused = set(re.findall(r"`([^`]+)`", row))
    return refused, {"nodes": nodes, EQUAL: same, STOCK_FAILS: failing}


def judged(server: ComfyServer, info: Mapping[str, Any], kind: str, pipeline: str) -> str:
    """EQUAL, REFUSED or STOCK_FAILS; AssertionError for anything else."""
    ours, node = outcome(server, info, kind, pipeline, ours=True)
    if names_it(ours, node):
        return REFUSED
    stock, _ = outcome(server, info, kind, pipeline, ours=False)
    if stock.failed:
        # For a model of another kind, or with a stand-in that is not what the node takes.
        return STOCK_FAILS
    assert not ours.failed, f"{ours}; ComfyUI's own loader: {stock}"
    for mine, theirs in zip(ours.tensors, stock.tensors, strict=True):
        assert mine.shape == theirs.shape
        assert torch.isfinite(theirs).all()
        assert torch.equal(mine, theirs) or relative_error(mine, theirs) <= TOLERANCE
    return EQUAL


def names_it(found: Outcome, node: str) -> bool:
    """An error of this pack's, on the node or with its id, and with what to do."""
    if found.error is None:
        return False
    text, where = found.error["exception_message"], found.error["node_id"]
    named = where == node or f"(node {node})" in text
    return named and found.error["exception_type"] == "ValueError" and bool(REMEDY.search(text))


def all_judged(server: ComfyServer, info: Mapping[str, Any], kind: str, nodes: Iterable[str]) -> dict[str, str]:
    found, wrong = {}, {}
    for node in nodes:
        try:
            found[node] = judged(server, info, node, PIPELINES[kind])
        except (AssertionError, TimeoutError) as error:
            wrong[node] = str(error)
    assert not wrong, "\n".join(f"{node}: {what}" for node, what in wrong.items())
    return found


@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["MODEL", "CLIP", "VAE"])
def test_draws_what_stock_draws_or_says_why_not(kind, qwen, info):
    found = all_judged(qwen, info, kind, takers(info, kind))
    refused, counts = documented(kind)
    assert {node for node, result in found.items() if result == REFUSED} == refused
    results = list(found.values())
    assert {"nodes": len(found), **{result: results.count(result) for result in (EQUAL, STOCK_FAILS)}} == counts, found


OF_MANY_GRAPHS = {
    "tiny": (
        "RenormCFG", "RescaleCFG", "CFGZeroStar", "CFGNorm", "APG", "TCFG", "Mahiro", "FreSca", "PerpNeg",
        "ModelSamplingFlux", "ModelSamplingAuraFlow", "DifferentialDiffusion", "ModelAttentionBackend",
        "LoraModelLoader", "wanBlockSwap", "ContextWindowsManual", "BasicScheduler", "CFGGuider",
    ),
    PIPELINE: (
        "CLIPAttentionMultiply", "LoraLoader", "SetClipHooks", "T5TokenizerOptions", "TextEncodeQwenImageEditPlus",
        "SelectCLIPDevice",
        "VAEDecode", "VAEDecodeTiled", "VAEEncodeTiled", "VAEEncodeForInpaint", "InpaintModelConditioning",
        "SelectVAEDevice",
    ),
}  # fmt: skip
"""Nodes that many graphs have, or that once did not work: of MODEL behind a FLUX.2, of CLIP and VAE a Qwen-Image."""


@pytest.mark.parametrize(
    ("pipeline", "kinds"),
    [(name, kinds[first : first + 6]) for name, kinds in OF_MANY_GRAPHS.items() for first in range(0, len(kinds), 6)],
)
def test_nodes_of_many_graphs_draw_what_stock_draws(pipeline, kinds, qwen, info):
    """Several in one graph, which takes less time."""

    def drawn(graph: NodeGraph) -> list[Tensor]:
        result = run_well(qwen, graph.graph)
        return [saved_latent(qwen, result, save) for save in graph.saves]

    both = [NodeGraph(info, pipeline, ours) for ours in (True, False)]
    for graph in both:
        for kind in kinds:
            graph.draw(graph.add(kind), kind)
    ours, stock = map(drawn, both)
    errors = [relative_error(mine, theirs) for mine, theirs in zip(ours, stock, strict=True)]
    assert len(errors) >= 6
    assert max(errors) <= TOLERANCE, errors
    assert len({tuple(mine.flatten()[:64].tolist()) for mine in ours}) > 1, "no node has changed anything"


@pytest.mark.parametrize(
    ("kind", "pipeline"),
    [
        *(
            (kind, "tiny")
            for kind in ("FluxKVCache", "PerturbedAttentionGuidance", "ModelMergeFlux1", "CheckpointSave")
        ),
        *((one, PIPELINE) for one in ("CLIPSetLastLayer", "CLIPMergeSimple", "CLIPSave", "TextGenerate", "VAESave")),
    ],
)
def test_refused_under_its_own_name(kind, pipeline, qwen, info):
    ours, node = outcome(qwen, info, kind, pipeline, ours=True)
    assert names_it(ours, node), ours
    name = info[kind]["display_name"] or kind
    assert f'"{name}" (node {node})' in ours.error["exception_message"]
