"""An exchange that never ends: when a mesh is built, in the first step of a size, and in a later one, on every axis."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.comfyui.graphs import unload
from tests.comfyui.processes import worker_ranks
from tests.comfyui.server import ComfyServer

from .conftest import MESH_DEADLINE, STEP_DEADLINE
from .drawings import Drawing, Ended
from .injection import IN_STEP, Order, Orders
from .test_cancel import Canceller
from .test_death import FAIL_SECONDS, GONE_SECONDS, assert_all_gone

AXES = {"ulysses": {"ulysses": 2}, "ring": {"ring": 2}, "tp": {"tp": 2}, "all ranks": {"ulysses": 2, "tp": 2}}
"""What of a mesh is exchanged over, and degrees with which it is."""
FOREVER = 600.0
SILENT = f"did not answer within {STEP_DEADLINE:g} s"
TEXT = "a yellow square"
_seeds = itertools.count(7000)
_widths = itertools.count(160, 32)
"""Of sizes that no step has had."""


def drawing(axis: str, **options: Any) -> Drawing:
    degrees = {"ulysses": 1, "ring": 1, "tp": 1} | AXES[axis]
    return Drawing(TEXT, layout=degrees, seed=next(_seeds), **options)


def after_steps(count: int, then: Callable[[], None], ended: Ended) -> Callable[[dict[str, Any]], None]:
    """An ``on_message`` that does something once so many steps of a sampler are over."""
    done = threading.Event()

    def on_message(message: dict[str, Any]) -> None:
        ended(message)
        if message["type"] == "progress" and message["data"]["max"] < 100 and message["data"]["value"] >= count:
            if not done.is_set():
                then()
            done.set()

    return on_message


def fails(server: ComfyServer, orders: Orders, graph: Drawing, moment: str, axis: str) -> tuple[str, float]:
    """Draw, with an exchange that never ends: the error, and how many seconds after that it was told."""
    ended = Ended()
    where = f"mesh {axis}" if moment == "mesh" else IN_STEP
    order = Order(1, where, "sleep", seconds=FOREVER)
    if moment == "later":
        result = server.run(graph.graph, on_message=after_steps(2, lambda: orders.give(order), ended), timeout=90)
    else:
        orders.give(order)
        result = server.run(graph.graph, on_message=ended, timeout=90)
    fault = orders.carried_out()
    assert fault is not None, "the moment never came"
    assert result.error is not None
    assert ended.at is not None
    assert_all_gone(server, ended.at + GONE_SECONDS)
    return result.error["exception_message"], ended.at - fault


@pytest.mark.parametrize(
    ("axis", "moment"),
    [
        pytest.param(axis, moment, marks=[] if few else [pytest.mark.thorough])
        for axis, moment, few in (
            *((axis, "mesh", axis == "ulysses") for axis in AXES),
            *((axis, "first", axis == "ring") for axis in AXES),
            *((axis, "later", axis == "tp") for axis in AXES),
        )
    ],
)
def test_an_exchange_that_never_ends(axis, moment, server, orders):
    size = {"width": next(_widths), "height": 64}
    steps = {"steps": 40} if moment == "later" else {}
    unload(server)  # also a group of as many ranks as another axis has
    if moment != "mesh":
        drawing(axis, width=64, height=64).run_well(server)
        ranks = worker_ranks(server)
    broken = drawing(axis, **size, **steps)
    text, took = fails(server, orders, broken, moment, axis)
    print(f"an exchange on {axis} that never ends, {moment}: told after {took:.1f} s")
    *others, last = range(2 * (len(AXES[axis])))
    deadline = MESH_DEADLINE if moment == "mesh" else STEP_DEADLINE
    assert deadline - 1 < took < deadline + FAIL_SECONDS
    if moment == "mesh":
        names = ", ".join(f"rank {rank} (the CPU)" for rank in others)
        who = f"{names} and rank {last} (the CPU) did not reach each other"
        assert text.startswith(f"{who} within {MESH_DEADLINE:g} s, on the axis {axis}"), text
        assert "What would help: " in text
    else:
        assert text.startswith(f"rank {', '.join(map(str, (*others, last)))} {SILENT}"), text
    assert "the next run starts a fresh group" in text
    orders.withdraw()
    again = drawing(axis, **size)
    first = again.run_well(server)
    assert torch.isfinite(first).all()
    if moment != "mesh":
        assert not set(worker_ranks(server)) & set(ranks)


def test_cancel_while_a_first_step_hangs(server: ComfyServer, orders: Orders):
    """The next prompt does not wait behind it for ever, and the one after it is drawn."""
    drawing("ulysses", width=64, height=64).run_well(server)
    orders.give(Order(1, IN_STEP, "sleep", seconds=FOREVER))
    with Canceller(server, orders):
        result = server.run(drawing("ulysses", width=next(_widths)).graph, timeout=60)
    assert result.interrupted
    began = time.monotonic()
    result = server.run(drawing("ulysses").graph, timeout=60)
    took = time.monotonic() - began
    print(f"an exchange that never ends, behind Cancel: told after {took:.1f} s")
    assert took < STEP_DEADLINE + FAIL_SECONDS
    assert result.error is not None
    assert SILENT in result.error["exception_message"]
    orders.withdraw()
    drawing("ulysses").run_well(server)


def test_a_first_step_that_takes_long_and_gets_on(server: ComfyServer, orders: Orders):
    """Longer than its deadline, in rank 1, which says so: it is waited for."""
    drawing("ulysses", width=64, height=64).run_well(server)
    ranks = worker_ranks(server)
    orders.give(Order(1, IN_STEP, "work", seconds=1.6 * STEP_DEADLINE))
    began = time.monotonic()
    drawing("ulysses", width=next(_widths), height=64).run_well(server)
    assert time.monotonic() - began > 1.5 * STEP_DEADLINE
    assert worker_ranks(server) == ranks
