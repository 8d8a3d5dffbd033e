"""What happens while a LoRA is applied: the next picture has it, whatever that was."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.comfyui.graphs import run_well
from tests.comfyui.lora_files import write_tiny_lora
from tests.comfyui.processes import worker_ranks
from tests.comfyui.server import ComfyServer

from .drawings import Drawing, other_drawing
from .injection import Order, Orders
from .test_cancel import REST, SLEEP, Canceller


@pytest.fixture(scope="module")
def drawing(server: ComfyServer) -> Drawing:
    """A drawing with a LoRA; `other_drawing` is with the same group's model without one."""
    drawing = Drawing("a blue circle", seed=7)
    graph, model = drawing.graph, (drawing.loader, 0)
    lora = graph.add("LoraLoaderModelOnly", model=model, lora_name=write_tiny_lora(server), strength_model=1.0)
    graph[str(drawing.sampler)]["inputs"]["model"] = [str(lora), 0]
    return drawing


@pytest.fixture(scope="module")
def expected(server: ComfyServer, drawing: Drawing) -> torch.Tensor:
    other_drawing(server)
    found = drawing.run_well(server)
    assert not torch.equal(found, Drawing("a blue circle", seed=7).run_well(server)), "the LoRA changes nothing"
    return found


def test_cancel(server: ComfyServer, orders: Orders, drawing: Drawing, expected):
    other_drawing(server)
    ranks = worker_ranks(server)
    orders.give(Order(1, "adapt", "sleep", seconds=SLEEP))
    with Canceller(server, orders):
        result = server.run(drawing.graph, timeout=60)
    assert result.interrupted
    release = threading.Timer(REST, orders.withdraw)
    release.start()
    assert torch.equal(drawing.drawn(server, run_well(server, drawing.graph)), expected)
    release.join()
    assert worker_ranks(server) == ranks


def test_a_rank_is_killed(server: ComfyServer, orders: Orders, drawing: Drawing, expected):
    other_drawing(server)
    orders.give(Order(1, "adapt", "kill"))
    result = server.run(drawing.graph, timeout=60)
    assert result.error is not None
    assert "rank 1" in result.error["exception_message"]
    assert torch.equal(drawing.run_well(server), expected)


def test_no_memory(server: ComfyServer, orders: Orders, drawing: Drawing, expected):
    """On all ranks; they go on."""
    other_drawing(server)
    ranks = worker_ranks(server)
    orders.give(Order(0, "adapt", "oom"), Order(1, "adapt", "oom"))
    result = server.run(drawing.graph, timeout=60)
    assert result.error is not None
    assert "memory" in result.error["exception_message"]
    assert torch.equal(drawing.run_well(server), expected)
    assert worker_ranks(server) == ranks
