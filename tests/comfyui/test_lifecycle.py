"""Worker groups through a session: shared, cancelled, killed, unloaded, and gone when the server is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import new_server
from .graphs import Graph, NodeId, add_latent, add_loader, add_sampler, assert_still_draws, run_well, save_latent
from .processes import Watch, group_processes, worker_ranks
from .server import ComfyServer, ServerDied

LAYOUT = {"ulysses": 2, "ring": 1, "tp": 1}
"""Two ranks: the quickest to start."""
STATES = ("starting", "loading", "ready")
"""What a node that starts a group says, in this order."""
LONG = {"steps": 400}
"""More steps than anything here waits for."""

CANCEL_SECONDS = 1.0
"""From Cancel to the end of the run. A step takes a tenth of that, and waiting looks for Cancel every 50 ms."""
END_SECONDS = 10.0
"""Within this all workers are gone after the server was killed; they notice at once, Python takes its time to end."""


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


def unload(server: ComfyServer) -> None:
    graph = Graph()
    graph.add("HybridDiT_UnloadWorkers", after=add_latent(graph))
    run_well(server, graph)


def drawing(seed: int, **changes: Any) -> tuple[Graph, NodeId, NodeId]:
    """A graph that draws with the group; its loader and sampler."""
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    sampler = add_sampler(graph, loader, seed=seed, **changes)
    save_latent(graph, sampler)
    return graph, loader, sampler


def at_progress_of(node: NodeId, action: Callable[[], None], value: int = 1) -> Callable[[dict[str, Any]], None]:
    """An ``on_message`` that acts once, as soon as ``node`` has come to step ``value``."""
    done = []

    def on_message(message: dict[str, Any]) -> None:
        if message["type"] == "progress_state" and not done:
            progress = message["data"]["nodes"].get(str(node))
            if progress is not None and progress["value"] >= value:
                done.append(True)
                action()

    return on_message


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


# --- Cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_while_sampling(server, group):
    graph, _, sampler = drawing(41, **LONG)
    pressed: list[float] = []
    ended: list[float] = []

    def cancel() -> None:
        pressed.append(time.monotonic())
        server.interrupt()

    on_progress = at_progress_of(sampler, cancel, value=2)

    def on_message(message: dict[str, Any]) -> None:
        if message["type"] == "execution_interrupted":
            ended.append(time.monotonic())
        on_progress(message)

    result = server.run(graph, on_message=on_message)
    assert result.interrupted
    assert result.error is None
    assert ended[0] - pressed[0] < CANCEL_SECONDS
    # The ranks are the same, and what was in flight does not end up in the next picture.
    assert_still_draws(server, **LAYOUT)
    assert worker_ranks(server) == group


def test_cancel_while_starting(server):
    unload(server)
    assert group_processes(server) == set()
    graph, _, _ = drawing(42)
    started: list[dict[int, int]] = []
    seconds: list[float] = []

    def cancel() -> None:
        # The ranks take seconds from when they are there to when they are up.
        while not worker_ranks(server):
            time.sleep(0.02)
        started.append(worker_ranks(server))
        seconds.append(time.monotonic())
        server.interrupt()

    def on_message(message: dict[str, Any]) -> None:
        if message["type"] == "execution_interrupted":
            seconds.append(time.monotonic())

    canceller = threading.Thread(target=cancel)
    canceller.start()
    result = server.run(graph, on_message=on_message)
    canceller.join()
    assert result.interrupted
    assert result.error is None
    assert seconds[1] - seconds[0] < CANCEL_SECONDS
    # The ranks go on starting, and the next prompt has them.
    assert_still_draws(server, **LAYOUT)
    assert set(started[0]) <= set(worker_ranks(server))


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
    assert any(text.endswith("ranks at 100 100 %") for text in texts)
    assert texts[-1] == "ready: ulysses 2 x ring 1 x tp 1 on cpu"


def test_report_needs_a_group(server, group):
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    unloaded = graph.add("HybridDiT_UnloadWorkers", after=(loader, 0))
    report = graph.add("HybridDiT_WorkersReport", model=unloaded)
    error = server.run(graph).error
    assert error is not None
    assert error["node_id"] == str(report)
    assert "not up" in error["exception_message"]


# --- death -----------------------------------------------------------------------------------------------------------


def test_killed_rank(server, group):
    (victim,) = (pid for pid, rank in group.items() if rank == 1)
    graph, _, sampler = drawing(61, **LONG)
    with Watch(group_processes(server)) as watch:
        kill = at_progress_of(sampler, lambda: os.kill(victim, signal.SIGKILL), value=2)
        result = server.run(graph, on_message=kill, timeout=60)
        # The other rank, waiting for the killed one in a collective, has gone too.
        assert not watch.wait(END_SECONDS)
    assert result.error is not None
    assert result.error["node_id"] == str(sampler)
    assert [message["type"] for message in result.messages].count("execution_error") == 1
    assert "rank 1" in result.error["exception_message"]
    assert "SIGKILL" in result.error["exception_message"]

    assert_still_draws(server, **LAYOUT)
    fresh = worker_ranks(server)
    assert sorted(fresh.values()) == [0, 1]
    assert not set(fresh) & set(group)


def test_killed_between_two_runs(server, group):
    (victim,) = (pid for pid, rank in group.items() if rank == 0)
    with Watch(group_processes(server)) as watch:
        os.kill(victim, signal.SIGKILL)
        assert not watch.wait(END_SECONDS)
    # Nobody waited for it, so nobody gets an error.
    assert_still_draws(server, **LAYOUT)
    assert not set(worker_ranks(server)) & set(group)


@pytest.fixture
def own_server(comfyui: Path, home: Path):
    """A server that a test may kill."""
    with new_server(comfyui, home) as server:
        yield server


def test_killed_server(own_server):
    graph, _, sampler = drawing(71, **LONG)
    watches: list[Watch] = []

    def kill() -> None:
        watches.append(Watch(group_processes(own_server)))
        assert len(worker_ranks(own_server)) == 2
        own_server.kill()

    with pytest.raises(ServerDied, match="connection"):
        own_server.run(graph, on_message=at_progress_of(sampler, kill, value=2))
    (watch,) = watches
    with watch:
        assert not watch.wait(END_SECONDS)
