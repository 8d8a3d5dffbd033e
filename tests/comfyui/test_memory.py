"""ComfyUI's "Unload Models" and "Free model and node cache" reach the workers, and nothing has to be started again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.single_file import flux2_tensors, write

from .graphs import Graph, add_layout, add_loader, add_sampler, assert_still_draws, run_well, save_latent, saved_latent
from .processes import worker_ranks

LAYOUT = {"ulysses": 1, "ring": 1, "tp": 2}
ANSWER_SECONDS = 20.0
"""ComfyUI looks at the request when its queue is idle, once a second; then the workers free."""


@pytest.fixture(scope="module")
def large(server):
    """A file whose weights would be missed: 420 MB."""
    folder = server.models / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    path = write(folder / "large.safetensors", flux2_tensors(heads=8, double=1, single=6))
    yield path
    path.unlink()


def held(server) -> int:
    """Bytes of memory of all workers that no file stands behind."""
    total = 0
    for pid in worker_ranks(server):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1]) * 1024
    return total


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + ANSWER_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def draw(server, name, seed=1):
    graph = Graph()
    layout = add_layout(graph, **LAYOUT)
    model = graph.add("HybridDiT_LoadDiffusionModel", unet_name=name, layout=layout, weight_dtype="default")
    loader = add_loader(graph, **LAYOUT)
    latent = save_latent(graph, add_sampler(graph, loader, model=model, seed=seed))
    report = graph.add("HybridDiT_WorkersReport", model=model, after=None)
    del graph[str(report)]["inputs"]["after"]
    result = run_well(server, graph)
    return saved_latent(server, result, latent), json.loads(result.outputs[str(report)]["text"][0])


def test_two_loaders_of_a_graph_share_the_workers(server, large):
    draw(server, large.name)
    assert sorted(worker_ranks(server).values()).count(0) <= 2  # at most the group of another layout beside it


def test_unloaded_models_come_back_in_the_same_workers(server, large):
    latent, report = draw(server, large.name)
    ranks = set(worker_ranks(server))
    before = held(server)
    size = sum(rank["weight_bytes"]["transformer"] for rank in report["ranks"])
    server.post("/free", {"unload_models": True})
    assert wait_for(lambda: held(server) < before - 0.7 * size)
    said = "transformer of large.safetensors unloaded as ComfyUI asked for memory"
    assert wait_for(lambda: said in server.log_text())  # ComfyUI writes it when the ranks have answered
    again, _ = draw(server, large.name, seed=1)
    assert again.equal(latent)  # ComfyUI kept its nodes' results
    other, _ = draw(server, large.name, seed=2)
    assert not other.equal(latent)
    assert held(server) > before - 0.3 * size
    assert ranks <= set(worker_ranks(server))


def test_freed_models_are_gone_until_they_are_loaded_again(server, large):
    latent, report = draw(server, large.name, seed=3)  # no node's result of the tests before: the model is loaded
    ranks = set(worker_ranks(server))
    before = held(server)
    size = sum(rank["weight_bytes"]["transformer"] for rank in report["ranks"])
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert wait_for(lambda: held(server) < before - 0.7 * size)
    again, _ = draw(server, large.name, seed=3)
    assert again.equal(latent)
    assert ranks <= set(worker_ranks(server))
    assert_still_draws(server)


LENDS = """
import sys
from types import SimpleNamespace
shared = sys.modules[type(m).__module__.rpartition(".")[0] + ".shared_memory"]
def ended(size, name):
    raise shared.WorkersFailedError("rank 1 ended, killed by signal 9 (SIGKILL)")
kept = shared.find_group, shared.name_of
shared.find_group, shared.name_of = lambda group: SimpleNamespace(lend=ended), lambda device: "a GPU"
try:
    config = SimpleNamespace(group=None, devices=SimpleNamespace(visible=("a GPU",)))
    given = shared.lend(config, torch.device("cpu"), 3 * 2**30)
finally:
    shared.find_group, shared.name_of = kept
    shared._needs.pop("a GPU", None)
assert given == 0, given
"""


def test_comfyui_goes_on_where_workers_end_while_it_takes_their_memory(server):
    """It asks in the middle of its own node, which must not fail by it: a line in the log, and the picture is drawn."""
    graph = Graph()
    loader = add_loader(graph, **LAYOUT)
    lends = graph.add("ReferenceChange", model=(loader, 0), statements=LENDS)
    save_latent(graph, add_sampler(graph, loader, model=lends, seed=5))
    before = len(server.log_text())
    run_well(server, graph)
    said = server.log_text()[before:]
    assert "asked for 3.0 GiB of GPU a GPU: rank 1 ended, killed by signal 9 (SIGKILL)" in said
    assert_still_draws(server)
