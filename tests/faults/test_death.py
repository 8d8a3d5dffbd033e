"""A rank that dies, fails or hangs at any moment: one clear error, soon; no rank survives; the next prompt works."""

from __future__ import annotations

import os
import re
import resource
import signal
import stat
import time
from pathlib import Path

import pytest
import torch

from tests.comfyui.conftest import EXAMPLE_IMAGE
from tests.comfyui.graphs import run_well, unload
from tests.comfyui.processes import worker_ranks
from tests.comfyui.server import ComfyServer
from tests.errors import relative_error

from .conftest import STEP_DEADLINE
from .drawings import Drawing, Ended, node_of, other_drawing
from .injection import EXIT_CODE, INJECTED, Order, Orders
from .leaks import holdings, started_by

FAIL_SECONDS = 5.0
"""From the fault to the error."""
GONE_SECONDS = 10.0
"""From the fault to the end of the other ranks."""
TEXT = "a red circle on a blue square"

WORDS = {
    "kill": [r"rank {rank} ended, killed by signal 9 \(SIGKILL\)"],
    "exit": [rf"rank {{rank}} ended with exit code {EXIT_CODE}"],
    "raise": [rf"rank {{rank}} failed: RuntimeError: {INJECTED}", "Traceback"],
    "oom": [r"rank {rank} ran out of memory: it asked for 2\.50 GiB where 1\.25 GiB were free", "What would help: "],
    "cuda": [r"^the CPU of rank {rank} failed: AcceleratorError: CUDA error: unspecified launch failure"],
    "stop": [rf"rank {{rank}} is stopped \(SIGSTOP\), and the group did not answer within {STEP_DEADLINE:g} s"],
}
NO_REQUEST = ("start", "rendezvous", "between")
"""Moments at which a rank is not at work on a request: what is raised ends it."""
WORDS_OF_ITS_END = ["rank {rank} ended with exit code 1", f"RuntimeError: {INJECTED}"]
CASES = [
    Order(1, "start", "kill"),
    Order(0, "start", "raise"),
    Order(1, "rendezvous", "raise"),
    Order(0, "load", "exit"),
    Order(1, "encode_text", "raise"),
    Order(0, "predict", "oom", nth=2),
    Order(1, "predict", "stop", nth=3),
    Order(1, "in step", "cuda", nth=3),
    Order(0, "collective", "kill", nth=30),
    Order(1, "between", "kill", nth=2),
    Order(0, "decode", "raise"),
]
"""Every kind and every moment once; the soak test has every kind at every moment."""


@pytest.fixture(scope="module")
def drawing(server: ComfyServer) -> Drawing:
    return Drawing(TEXT, seed=5)


@pytest.fixture(scope="module")
def expected(server: ComfyServer, drawing: Drawing) -> torch.Tensor:
    """What is drawn where nothing goes wrong."""
    unload(server)  # groups of earlier tests
    other_drawing(server)
    return drawing.run_well(server)


@pytest.fixture(scope="module")
def before(server: ComfyServer, expected: torch.Tensor):
    """What the server holds while a group is up and nothing has gone wrong."""
    other_drawing(server)
    return holdings(server)


@pytest.mark.parametrize("order", CASES, ids=lambda order: f"{order.kind}-{order.moment}-rank-{order.rank}")
def test_rank(order: Order, server: ComfyServer, orders: Orders, drawing: Drawing, expected, before):
    if order.moment in ("start", "rendezvous", "load"):
        unload(server)
    else:
        other_drawing(server)  # starts a group where there is none
    orders.give(order)
    ended = Ended()
    result = server.run(drawing.graph, on_message=ended, timeout=90)
    fault = orders.carried_out()
    assert fault is not None, "the moment never came"
    found = fault + (STEP_DEADLINE if order.kind == "stop" else 0)
    assert_all_gone(server, found + GONE_SECONDS)

    assert result.error is not None
    assert ended.at is not None
    took = ended.at - found
    print(f"{order.kind} in {order.moment} of rank {order.rank}: told after {took:.2f} s")
    assert took < FAIL_SECONDS
    assert [message["type"] for message in result.messages].count("execution_error") == 1
    text = result.error["exception_message"]
    assert result.error["node_id"] in set(map(str, node_of(drawing, order.moment))), text
    for words in WORDS_OF_ITS_END if (order.kind, order.moment in NO_REQUEST) == ("raise", True) else WORDS[order.kind]:
        assert re.search(words.format(rank=order.rank), text), text
    check_log(text, order)

    again = run_well(server, drawing.graph)
    assert torch.equal(drawing.drawn(server, again), expected)
    assert sorted(worker_ranks(server).values()) == [0, 1]
    assert not holdings(server).more_than(before, slack=2)
    assert holdings(server).processes == before.processes
    assert holdings(server).temporary == before.temporary


def assert_all_gone(server: ComfyServer, until: float) -> None:
    """No process that the server started is left by then (`time.time`)."""
    while left := started_by(server):
        assert time.time() < until, left
        time.sleep(0.05)


def check_log(text: str, order: Order) -> None:
    """The error points to a log, which only the user can read, and which has what there is to know."""
    (log,) = re.findall(r"\((?:log: )?(/\S+\.log)\)", text)
    log = Path(log)
    if order.moment != "start":  # the rank had not come so far as to have one
        assert log.name == f"rank-{order.rank}.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    if order.kind == "raise":
        assert INJECTED in log.read_text()


@pytest.mark.parametrize("kind", ["raise", "oom"])
def test_all_ranks_at_the_same_place(kind, server, orders, drawing, expected, before):
    """They can go on: nothing is loaded again."""
    other_drawing(server)
    ranks = worker_ranks(server)
    orders.give(*(Order(rank, "predict", kind, nth=2) for rank in sorted(ranks.values())))
    result = server.run(drawing.graph, timeout=90)
    assert result.error is not None
    text = result.error["exception_message"]
    for words in WORDS[kind]:
        assert re.search(words.format(rank=0), text), text
    check_log(text, Order(0, "predict", kind))
    again = run_well(server, drawing.graph)
    assert torch.equal(drawing.drawn(server, again), expected)
    assert worker_ranks(server) == ranks
    assert not {"starting", "loading"} & {state.partition(":")[0] for _, state in again.texts}
    assert not holdings(server).more_than(before, slack=2)


def test_out_of_memory_in_the_vae(server, orders, drawing, expected, before):
    """Rank 0 alone is at work: ComfyUI goes on with tiles, as it does with a VAE of its own."""
    other_drawing(server)
    ranks = worker_ranks(server)
    orders.give(Order(0, "vae_decode", "oom"))
    result = run_well(server, drawing.graph)
    assert orders.carried_out() is not None
    assert "retrying with tiled VAE decoding" in server.log_text()
    assert relative_error(drawing.drawn(server, result), expected) < 1e-2  # tiles have seams
    assert worker_ranks(server) == ranks
    assert not holdings(server).more_than(before, slack=2)


@pytest.mark.parametrize("moment", ["vae_encode", "vae_decode"])
def test_work_of_rank_0_alone_fails(moment, server, orders, drawing, expected, before):
    """An error on the node, and nothing is loaded again."""
    other_drawing(server)
    ranks = worker_ranks(server)
    orders.give(Order(0, moment, "raise"))
    image = Drawing(TEXT, seed=5, image=EXAMPLE_IMAGE)
    result = server.run(image.graph, timeout=90)
    assert result.error is not None
    text = result.error["exception_message"]
    assert result.error["node_type"] == {"vae_encode": "VAEEncode", "vae_decode": "VAEDecode"}[moment]
    assert re.search(WORDS["raise"][0].format(rank=0), text), text
    assert "fresh group" not in text
    assert torch.equal(drawing.run_well(server), expected)
    assert worker_ranks(server) == ranks
    assert not holdings(server).more_than(before, slack=2)


def test_memory_that_cannot_be_given_back(server, orders, drawing, expected):
    """ComfyUI's own thread asks for it when its queue is idle; it must not end by that."""
    other_drawing(server)
    orders.give(*(Order(rank, "offload", "raise") for rank in worker_ranks(server).values()))
    server.post("/free", {"unload_models": True})
    deadline = time.monotonic() + 20
    while orders.carried_out() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert torch.equal(drawing.run_well(server), expected)


def test_killed_between_two_prompts(server, drawing, expected):
    other_drawing(server)
    (victim,) = (pid for pid, rank in worker_ranks(server).items() if rank == 0)
    os.kill(victim, signal.SIGKILL)
    assert_all_gone(server, time.time() + GONE_SECONDS)
    # Nobody waited for it, so nobody gets an error.
    assert torch.equal(drawing.run_well(server), expected)


def test_real_shortage_of_memory(server, drawing, expected):
    """A rank may allocate no more: torch's own error, no ordered one."""
    other_drawing(server)
    (victim,) = (pid for pid, rank in worker_ranks(server).items() if rank == 1)
    status = Path(f"/proc/{victim}/status").read_text()
    size = int(re.search(r"VmSize:\s+(\d+) kB", status).group(1)) * 1024
    resource.prlimit(victim, resource.RLIMIT_AS, (size + 2**24, size + 2**24))
    large = Drawing(TEXT, seed=5, width=1536, height=1536)
    result = server.run(large.graph, timeout=120)
    assert result.error is not None
    text = result.error["exception_message"]
    assert re.search(r"rank 1 ran out of memory: it asked for \d+\.\d\d GiB where \d+\.\d\d GiB were free", text), text
    assert "What would help: draw a smaller picture" in text
    assert "TP-2 on 2 devices" in text
    assert torch.equal(drawing.run_well(server), expected)
