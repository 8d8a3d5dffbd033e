"""The other way round: ComfyUI goes, or its users change their minds, and nothing is left behind or mixed up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.comfyui.graphs import unload
from tests.comfyui.processes import Watch, group_processes, worker_ranks
from tests.comfyui.server import ComfyServer, ServerDied

from .conftest import hangups_end_processes
from .drawings import Drawing, other_drawing
from .injection import Order, Orders
from .leaks import holdings, temporary_files

GONE_SECONDS = 10.0
"""Within this all workers are gone after ComfyUI."""


# --- ComfyUI ends ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doomed(server: ComfyServer, orders: Orders):
    """The session's server, which is killed, and started again where that is not the last that happens to it."""
    with hangups_end_processes():
        yield server, orders


# Any client's end at other moments, also by a signal to its process group, is in tests/runtime.
@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=pytest.mark.thorough) for moment in ("start", "load")] + ["predict"]
)
def test_comfyui_is_killed(moment: str, doomed: tuple[ComfyServer, Orders]):
    ends(*doomed, moment, lambda server: server.kill())


@pytest.mark.thorough
def test_the_terminal_is_closed(doomed: tuple[ComfyServer, Orders]):
    def hang_up(server: ComfyServer) -> None:
        # What the system does to the processes of a terminal that goes away.
        assert server.process is not None
        os.killpg(server.process.pid, signal.SIGHUP)
        server.process.wait()
        server.process = None

    ends(*doomed, "predict", hang_up)


def ends(server: ComfyServer, orders: Orders, moment: str, end) -> None:
    """End the server while one rank is held up at a moment: everything of it goes."""
    if server.process is None:
        server.start()
    unload(server)  # groups of earlier tests
    assert temporary_files(server) == set()
    orders.give(Order(1, moment, "sleep", seconds=60))
    drawing = Drawing(f"ended in {moment}", seed=8)

    def run() -> None:
        with contextlib.suppress(ServerDied, OSError):
            server.run(drawing.graph, timeout=60)

    queued = threading.Thread(target=run)
    queued.start()
    deadline = time.monotonic() + 60
    while orders.carried_out() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    processes = group_processes(server)
    assert len(processes) >= 2  # the agent, and a rank or two
    with Watch(processes) as watch:
        ended = time.monotonic()
        end(server)
        assert not watch.wait(GONE_SECONDS)
        print(f"ended in {moment}: all gone after {time.monotonic() - ended:.2f} s")
    queued.join()
    assert temporary_files(server) == set()
    orders.withdraw()


# --- users change their minds ----------------------------------------------------------------------------------------

LAYOUTS = {
    "Ulysses-2": {"ulysses": 2, "ring": 1, "tp": 1},
    "TP-2": {"ulysses": 1, "ring": 1, "tp": 2},
    "Ring-3": {"ulysses": 1, "ring": 3, "tp": 1},
}


def test_two_tabs_with_two_layouts(server: ComfyServer):
    """Both queue at once; each gets the pictures of its own graph, and nothing is held that was not before."""
    tabs = {
        name: [Drawing(f"{name}, {index}", LAYOUTS[name], seed=index, steps=2) for index in range(3)]
        for name in ("Ulysses-2", "TP-2")
    }
    expected = {name: [drawing.run_well(server) for drawing in drawings] for name, drawings in tabs.items()}
    other_drawing(server)
    before = holdings(server)
    with ThreadPoolExecutor(len(tabs)) as pool:
        found = dict(zip(tabs, pool.map(lambda drawings: [d.run_well(server) for d in drawings], tabs.values())))  # noqa: B905
    for name in tabs:
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert torch.equal(ours, theirs), name
    assert not holdings(server).more_than(before, slack=2)
    assert holdings(server).processes == before.processes


def test_the_layout_is_changed_while_the_graph_runs(server: ComfyServer):
    first = Drawing("before the change", LAYOUTS["Ulysses-2"], seed=1, steps=30)
    second = Drawing("before the change", LAYOUTS["TP-2"], seed=1, steps=2)
    alone = second.run_well(server)
    other_drawing(server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first.run_well, server)
        time.sleep(0.5)
        changed = second.run_well(server)
        running.result()
    assert torch.equal(changed, alone)


def test_a_group_too_many_takes_the_place_of_the_oldest(server: ComfyServer):
    unload(server)
    before = holdings(server)
    assert before.processes == 0
    single = {"ulysses": 1, "ring": 1, "tp": 1}
    for layout, ranks in ((single, [1]), (LAYOUTS["Ulysses-2"], [1, 2]), (LAYOUTS["Ring-3"], [2, 3])):
        Drawing("one more group", layout, seed=3, steps=1).run_well(server)
        counts = Counter(_group_of(pid) for pid in worker_ranks(server))
        assert sorted(counts.values()) == ranks
    unload(server)
    assert holdings(server).processes == 0
    assert not holdings(server).more_than(before, slack=2)


def _group_of(pid: int) -> int:
    """The agent above a rank."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
