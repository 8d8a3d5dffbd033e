"""Many prompts on one server, a fault in every fifth: each picture to the bit as the first time, and nothing grows."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from parallel_backend.drawing.demo_model import DEMO_FOLDER_NAME
from parallel_backend.runtime.client.groups import CPU_GROUPS
from tests.comfyui.graphs import unload
from tests.comfyui.processes import worker_ranks
from tests.comfyui.qwen_models import PIPELINE as QWEN
from tests.comfyui.server import ComfyServer

from .conftest import STEP_DEADLINE
from .drawings import Drawing, Ended
from .injection import Order, Orders
from .leaks import growth, holdings, resident_kib
from .test_cancel import Canceller
from .test_death import FAIL_SECONDS

FAULT_EVERY = 5
U2, TP2, RING2, U2_TP2 = ((2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2))
VARIANTS = (
    # model, degrees of ulysses, ring and tp, width, height, block cache
    ("tiny", U2, 128, 128, False),
    (QWEN, TP2, 128, 96, False),
    (DEMO_FOLDER_NAME, RING2, 192, 128, True),
    ("tiny", TP2, 96, 160, True),
    (QWEN, U2, 96, 96, True),
    (DEMO_FOLDER_NAME, U2, 128, 128, False),
    ("tiny", RING2, 64, 64, False),
    (QWEN, RING2, 64, 128, False),
    (DEMO_FOLDER_NAME, TP2, 256, 256, True),
    ("tiny", U2_TP2, 128, 64, False),
    (DEMO_FOLDER_NAME, U2_TP2, 160, 160, True),
)
"""Their number has no divisor in common with `FAULT_EVERY`, so that faults come to all of them."""
CANCEL = "sleep"
FAULTS = tuple(
    (kind, moment)
    for kind, moment in itertools.product(
        ("kill", "raise", "oom", CANCEL, "exit", "stop"),
        ("predict", "load", "collective", "encode_text", "decode", "start", "rendezvous", "between"),
    )
    # Before it connects a rank asks for nothing, and nobody knows it; and where it is not at work it ends either way.
    if (moment != "start" or kind not in ("oom", "stop"))
    and (moment not in ("rendezvous", "between") or kind in ("kill", "raise", "stop"))
)
"""As many as come to 200 prompts."""


@dataclass
class Findings:
    """What came of it: seconds, and KiB of memory after each quiet round."""

    prompts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest_error: float = 0.0
    slowest_recovery: float = 0.0
    leaks: dict[str, Any] = field(default_factory=dict)
    server_kib: list[int] = field(default_factory=list)
    worker_kib: list[int] = field(default_factory=list)
    round: int = 0
    """Prompts of a quiet round."""

    def report(self) -> dict[str, Any]:
        """As JSON has it, with the growth of the memory beside its figures."""
        figures = asdict(self)
        for name in ("server_kib", "worker_kib"):
            # After the first round, which still fills what is filled once.
            figures[f"{name}_a_prompt"] = round(growth(figures[name][1:]) / self.round, 1)
        return figures | {"faults": dict(self.faults), "injected": self.faults.total()}


def drawings(count: int) -> list[Drawing]:
    """The first of the variants, each with a text of its own: ComfyUI has nothing of it when it comes next."""
    found = []
    for number, (model, (ulysses, ring, tp), width, height, cache) in enumerate(VARIANTS[:count]):
        layout = {"ulysses": ulysses, "ring": ring, "tp": tp}
        found.append(
            Drawing(f"variant {number}", layout, model, seed=number, width=width, height=height, cached=cache, steps=6)
        )
    return found


def soak(server: ComfyServer, orders: Orders, prompts: int, rounds: int, variants: int) -> Findings:
    """Run ``prompts`` prompts with a fault in every fifth, then ``rounds`` for the memory, in which nothing starts."""
    findings = Findings()
    first: dict[int, torch.Tensor] = {}
    faults = itertools.cycle(FAULTS)
    graphs = drawings(variants)
    before = None
    fault: tuple[str, str] | None = None
    stay = [index for index in range(variants) if VARIANTS[index][1] in (U2, TP2)]
    assert CPU_GROUPS >= 2
    findings.round = len(stay)
    order = [number % variants for number in range(prompts)] + stay * rounds
    ranks: set[int] = set()
    for number, index in enumerate(order):
        recovering, fault = fault, None
        if number < prompts and number % FAULT_EVERY == FAULT_EVERY - 1:
            fault = next(faults)
            _with_fault(server, orders, graphs[index], fault, number, findings)
        else:
            began = time.monotonic()
            drawn = graphs[index].run_well(server)
            seconds = time.monotonic() - began
            if not torch.equal(first.setdefault(index, drawn), drawn):
                findings.wrong.append(f"prompt {number}, variant {index}, differs")
            if recovering is not None:
                findings.recoveries += 1
                findings.slowest_recovery = max(findings.slowest_recovery, seconds)
            _say(number, index, f"drawn in {seconds:.1f} s")
        findings.prompts += 1
        assert server.process is not None
        if number >= prompts and index == stay[-1]:
            findings.server_kib.append(resident_kib(server.process.pid))
            ranks, earlier = set(worker_ranks(server)), ranks
            if earlier and ranks != earlier:
                findings.wrong.append(f"prompt {number}: ranks {earlier - ranks} were replaced, and nothing was wrong")
            findings.worker_kib.append(sum(map(resident_kib, ranks)))
        if number == len(graphs):
            before = replace(holdings(server), processes=0)
    unload(server)
    after = holdings(server)
    if before is not None:
        findings.leaks = after.more_than(before, slack=3) | (
            {"processes": (0, after.processes)} if after.processes else {}
        )
    return findings


def _with_fault(
    server: ComfyServer, orders: Orders, drawing: Drawing, fault: tuple[str, str], number: int, findings: Findings
) -> None:
    """Run a graph with a fault in it; what is not as promised is noted."""
    kind, moment = fault
    if moment in ("start", "rendezvous", "load"):
        unload(server)
    rank = 0 if moment == "decode" else number % 2
    nth = {"predict": 3, "between": 3, "collective": 15}.get(moment, 1)
    orders.give(Order(rank, moment, kind, nth, seconds=3.0))
    ended = Ended()
    if kind == CANCEL:
        with Canceller(server, orders) as canceller:
            result = server.run(drawing.graph, on_message=ended, timeout=120)
        well, since = result.interrupted, canceller.pressed
    else:
        result = server.run(drawing.graph, on_message=ended, timeout=120)
        since = (orders.carried_out() or 0.0) + (STEP_DEADLINE if kind == "stop" else 0)
        well = result.error is not None and f"rank {rank}" in result.error["exception_message"]
    if ended.at is None or orders.carried_out() is None or not well:
        findings.wrong.append(f"prompt {number}: {kind} in {moment} was not told as it should: {result.error}")
        orders.withdraw()
        return
    took = ended.at - since
    if kind != CANCEL:
        findings.slowest_error = max(findings.slowest_error, took)
        if took > FAIL_SECONDS:
            findings.wrong.append(f"prompt {number}: {kind} in {moment} was told after {took:.1f} s")
    findings.faults[f"{kind} in {moment}"] += 1
    _say(number, None, f"{kind} in {moment} of rank {rank}, told after {took:.2f} s")


def _say(number: int, variant: int | None, what: str) -> None:
    print(f"prompt {number}{'' if variant is None else f', variant {variant}'}: {what}", flush=True)


def lines(report: dict[str, Any]) -> Iterator[str]:
    """A report for people."""
    yield f"{report['prompts']} prompts, {report['injected']} faults injected, {report['recoveries']} recoveries"
    yield f"slowest error {report['slowest_error']:.2f} s, slowest recovery {report['slowest_recovery']:.1f} s"
    yield f"memory: server {report['server_kib_a_prompt']} KiB a prompt, workers {report['worker_kib_a_prompt']}"
    yield f"leaks: {report['leaks'] or 'none'}; wrong: {report['wrong'] or 'nothing'}"
