"""Parallel Layout's auto: the loader chooses the degrees, and says so."""

from __future__ import annotations

import json

import pytest

from .graphs import Graph, add_layout, add_sampler, run_well, save_latent
from .server import PromptRejected


def test_on_the_cpu_auto_runs_one_rank_and_says_why(server):
    graph = Graph()
    layout = add_layout(graph, ulysses=7, ring=5, tp=3, auto=True)  # degrees that no machine has
    loader = graph.add("HybridDiT_LoadPipeline", pipeline="tiny", layout=layout, dtype="auto")
    save_latent(graph, add_sampler(graph, loader, seed=77))
    report = graph.add("HybridDiT_WorkersReport", model=(loader, 0))
    result = run_well(server, graph)
    texts = dict(result.texts)  # the last of each node
    assert texts[str(layout)] == "Chosen single: on the CPU, where a step takes as long on any layout"
    assert texts[str(loader)].startswith("ready: single on 1 CPU process\nstarted in ")
    (text,) = result.outputs[str(report)]["text"]
    assert json.loads(text)["layout"]["name"] == "single"


def test_auto_looks_at_the_devices_before_anything_runs(server):
    graph = Graph()
    layout = add_layout(graph, devices="gpu two", auto=True)
    loader = graph.add("HybridDiT_LoadPipeline", pipeline="tiny", layout=layout, dtype="auto")
    save_latent(graph, add_sampler(graph, loader))
    with pytest.raises(PromptRejected, match="cannot read the device 'gpu two'"):
        server.run(graph)
