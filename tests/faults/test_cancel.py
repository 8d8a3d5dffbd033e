"""Cancel at every point of a picture: it returns at once, and the next prompt has everything that is there already."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tests.comfyui.conftest import EXAMPLE_IMAGE
from tests.comfyui.graphs import run_well, unload
from tests.comfyui.processes import worker_ranks
from tests.comfyui.server import ComfyServer

from .conftest import STEP_DEADLINE
from .drawings import Drawing, Ended, other_drawing
from .injection import Order, Orders

FAIL_SECONDS = 5.0
"""From when a fault is found to the error."""
CANCEL_SECONDS = 0.2
"""From Cancel to the end of the run."""
TRIES = 3
"""The machine has other things to do at times: the best of so many counts."""
SLEEP = 20.0
"""How long a rank would take at a moment, were it let."""
REST = 0.3
"""How long it takes, once the next prompt is queued."""
TEXT = "a green triangle"


@pytest.fixture(scope="module")
def drawing(server: ComfyServer) -> Drawing:
    return Drawing(TEXT, seed=6, image=EXAMPLE_IMAGE)


@pytest.fixture(scope="module")
def expected(server: ComfyServer, drawing: Drawing) -> torch.Tensor:
    other_drawing(server)
    return drawing.run_well(server)


@pytest.mark.parametrize("moment", ["start", "load", "encode", "encode_text", "predict", "collective", "decode"])
def test_cancel(moment: str, server: ComfyServer, orders: Orders, drawing: Drawing, expected):
    found = []
    for _ in range(TRIES):
        seconds, picture = cancelled(moment, server, orders, drawing)
        found.append(seconds)
        assert torch.equal(picture, expected)
        if found[-1] < CANCEL_SECONDS:
            break
    print(f"Cancel in {moment}: {min(found) * 1000:.0f} ms")
    assert min(found) < CANCEL_SECONDS


def test_cancel_while_a_rank_hangs(server: ComfyServer, orders: Orders, drawing: Drawing, expected):
    """That is found out in the next prompt; the one after it is right."""
    other_drawing(server)
    orders.give(Order(1, "predict", "stop", nth=3))
    ended = Ended()
    with Canceller(server, orders) as canceller:
        result = server.run(drawing.graph, on_message=ended, timeout=60)
    assert result.interrupted
    assert ended.at is not None
    print(f"Cancel while a rank hangs: {(ended.at - canceller.pressed) * 1000:.0f} ms")
    began = time.monotonic()
    result = server.run(drawing.graph, timeout=60)
    assert time.monotonic() - began < STEP_DEADLINE + FAIL_SECONDS
    assert result.error is not None
    assert "rank 1 is stopped (SIGSTOP)" in result.error["exception_message"]
    assert torch.equal(drawing.run_well(server), expected)


def cancelled(moment: str, server: ComfyServer, orders: Orders, drawing: Drawing) -> tuple[float, torch.Tensor]:
    """Cancel while one rank takes its time at a moment: seconds until the run had ended, and what the next one drew."""
    fresh = moment in ("start", "load")
    if fresh:
        unload(server)
    else:
        other_drawing(server)
        ranks = worker_ranks(server)
    orders.give(Order(1, moment, "sleep", seconds=SLEEP))
    ended = Ended()
    with Canceller(server, orders) as canceller:
        result = server.run(drawing.graph, on_message=ended, timeout=60)
    assert result.interrupted
    assert result.error is None
    if fresh:
        ranks = worker_ranks(server)
    release = threading.Timer(REST, orders.withdraw)
    release.start()
    again = run_well(server, drawing.graph)
    release.join()
    assert worker_ranks(server) == ranks if not fresh else set(ranks) <= set(worker_ranks(server))
    states = [text.partition(":")[0] for _, text in again.texts]
    if not fresh:
        assert "loading" not in states
        assert "starting" not in states
    assert ended.at is not None
    return ended.at - canceller.pressed, drawing.drawn(server, again)


class Canceller:
    """Presses Cancel once an order is being carried out, in a thread of its own."""

    def __init__(self, server: ComfyServer, orders: Orders) -> None:
        self.server, self.orders, self.pressed = server, orders, 0.0
        self._thread = threading.Thread(target=self._press)

    def __enter__(self) -> Canceller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _press(self) -> None:
        deadline = time.monotonic() + 60
        while self.orders.carried_out() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)  # the others are waiting by now
        self.pressed = time.time()
        self.server.interrupt()
