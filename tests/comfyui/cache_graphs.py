"""Graphs with Block Cache, and what a run of them says on its nodes."""

from __future__ import annotations

import json
from typing import Any

import torch

from .graphs import (
    Graph,
    NodeId,
    Source,
    add_loader,
    run_well,
    save_latent,
    saved_latent,
)
from .server import ComfyServer, RunResult

STEPS = 8
FIELDS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}
"""For the tiny model's five blocks: whatever may be cached after two steps is."""


def add_cache(graph: Graph, model: Source, preset: str = "custom", **changes: Any) -> NodeId:
    """A Block Cache with FIELDS and what differs from them."""
    fields = {f"preset.{name}": value for name, value in {**FIELDS, **changes}.items()} if preset == "custom" else {}
    return graph.add("HybridDiT_BlockCache", model=model, preset=preset, **fields)


def runs(result: RunResult, node: NodeId) -> list[dict[str, Any]]:
    """The finished runs that were shown on a Block Cache node, in order."""
    sent = [m["data"] for m in result.messages if m["type"] == "hybrid_dit.block_cache"]
    return [run for run in sent if run["node"] == str(node) and not run["running"]]


def counts(run: dict[str, Any]) -> tuple[int, int, int]:
    return run["computed"], run["cached"], run["streams"]


def kept_bytes(server: ComfyServer, **layout: Any) -> tuple[list[int], dict[str, Any]]:
    """What each rank's cache keeps, and the last run's part of the report."""
    graph = Graph()
    node = graph.add("HybridDiT_WorkersReport", model=(add_loader(graph, **layout), 0))
    report = json.loads(run_well(server, graph).outputs[str(node)]["text"][0])
    return [rank["cache_bytes"] for rank in report["ranks"]], report["cache"]


def sample(server: ComfyServer, graph: Graph, *samples: Source) -> tuple[RunResult, list[torch.Tensor]]:
    """Run the graph; its result and those latents. No rank keeps anything of it."""
    saves = [save_latent(graph, source) for source in samples]
    result = run_well(server, graph)
    assert set(kept_bytes(server)[0]) == {0}
    return result, [saved_latent(server, result, save) for save in saves]
