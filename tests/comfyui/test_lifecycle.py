"""Worker groups through a session: shared, shown on the node that starts them, unloaded. tests/faults has the rest."""

from __future__ import annotations

import pytest

from .graphs import (
    Graph,
    NodeId,
    add_latent,
    add_loader,
    add_sampler,
    assert_still_draws,
    run_well,
    save_latent,
    unload,
)
from .processes import Watch, group_processes, worker_ranks
from .server import ComfyServer

LAYOUT = {"ulysses": 2, "ring": 1, "tp": 1}
"""Two ranks: the quickest to start."""
STATES = ("starting", "loading", "ready")
"""What a node that starts a group says, in this order."""
END_SECONDS = 10.0
"""Within this all workers are gone; they notice at once, Python takes its time to end."""


@pytest.fixture
def group(server: ComfyServer) -> dict[int, int]:
    """A group of two ranks is up, and no other: process id -> rank."""
    ranks = worker_ranks(server)
    if sorted(ranks.values()) != [0, 1]:
        unload(server)
        assert_still_draws(server, **LAYOUT)
        ranks = worker_ranks(server)
    assert sorted(ranks.values()) == [0, 1]
    return ranks


def drawing(seed: int) -> tuple[Graph, NodeId, NodeId]:
    """A graph that draws with the group; its loader and sampler."""
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    sampler = add_sampler(graph, loader, seed=seed)
    save_latent(graph, sampler)
    return graph, loader, sampler


# --- one group for equal settings ------------------------------------------------------------------------------------


def test_two_loaders_share_a_group(server, group):
    graph = Graph()
    for width in (128, 96):
        loader = add_loader(graph, **LAYOUT)
        latent = add_latent(graph, width=width)
        save_latent(graph, add_sampler(graph, loader, seed=31, latent_image=latent))
    run_well(server, graph)
    assert worker_ranks(server) == group


def test_another_seed_starts_nothing(server, group):
    for seed in (32, 33):
        graph, _, sampler = drawing(seed)
        result = run_well(server, graph)
        assert str(sampler) not in result.cached_nodes()
        assert worker_ranks(server) == group


# --- the states on the node, and unloading ---------------------------------------------------------------------------


def test_unload_and_start_again(server, group):
    with Watch(group_processes(server)) as watch:
        unload(server)
        assert not watch.wait(END_SECONDS)
    assert group_processes(server) == set()

    graph, loader, _ = drawing(51)
    result = run_well(server, graph)
    assert sorted(worker_ranks(server).values()) == [0, 1]
    texts = [text for node, text in result.texts if node == str(loader)]
    firsts = [next(i for i, text in enumerate(texts) if text.startswith(f"{state}:")) for state in STATES]
    assert firsts == sorted(firsts)
    assert f"{STATES[0]}: 2 of 2 processes up" in texts
    loaded = [int(text.split()[1]) for text in texts if text.startswith("loading: ")]
    assert loaded == sorted(loaded)
    assert loaded[-1] == 100
    assert texts[-1].startswith("ready: Ulysses-2 on 2 CPU processes\nstarted in ")


def test_report_needs_a_group(server, group):
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    unloaded = graph.add("HybridDiT_UnloadWorkers", after=(loader, 0))
    report = graph.add("HybridDiT_WorkersReport", model=unloaded)
    error = server.run(graph).error
    assert error is not None
    assert error["node_id"] == str(report)
    assert "not up" in error["exception_message"]
