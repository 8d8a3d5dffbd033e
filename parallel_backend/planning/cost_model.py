"""What a step costs on a layout: a rank's compute, as measured alone on one GPU, plus the exchanges that do not hide.

Everything here is arithmetic on numbers: `workload` counts what a model does, `auto_layout` knows machines and choices.
Compute is fitted to `rank_only.json`, which ``benchmarks/against_cache_dit.py --rank-only`` measured: GEMM and
attention are spread over all ranks; of the rest, some over the sequence's ranks only; Ulysses and Ring add theirs.
Exchanges are bytes over a bandwidth, and a latency for each call. Times are in ms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MESH_AXES, ParallelismConfig

MEASURED = Path(__file__).with_name("rank_only.json")
ELEMENT_BYTES = 2
"""Activations are exchanged in 16 bits."""


@dataclass(frozen=True)
class Workload:
    """What one step of a model does in full.

    Args:
        gemm_flops, attention_flops: floating-point operations.
        attentions: how often attention is computed.
        attention_elements: of the queries of all of them, together.
        reductions: row-parallel linears, whose outputs are summed over tp.
        reduced_elements: of their outputs, together.
    """

    gemm_flops: float
    attention_flops: float
    attentions: int
    attention_elements: float
    reductions: int
    reduced_elements: float


@dataclass(frozen=True)
class Device:
    """How fast a GPU is beside the one that was measured: by how much its times are longer."""

    compute: float = 1.0
    memory: float = 1.0


@dataclass(frozen=True)
class Link:
    """What a GPU exchanges with the others of a group: GB/s that it sends, and ms that a call takes beside that."""

    gb_per_s: float
    latency_ms: float

    def ms(self, sent_bytes: float, calls: float) -> float:
        return sent_bytes / self.gb_per_s / 1e6 + calls * self.latency_ms


@dataclass(frozen=True)
class Engine:
    """How a program computes and exchanges.

    Args:
        blocks: whose blocks compute, as `MEASURED` calls the side.
        exchanges: all-to-all calls around each attention.
        ulysses_hidden, tp_hidden: share of these exchanges that GEMMs hide.
        ring_hidden: whether a hop travels while a chunk is computed.
    """

    blocks: str = "ours"
    exchanges: int = 2
    ulysses_hidden: float = 0.0
    tp_hidden: float = 0.0
    ring_hidden: bool = True


OURS = Engine()
CACHE_DIT = Engine(blocks="diffusers", exchanges=4)
"""cache-dit 1.5.3: diffusers' blocks, which exchange queries, keys, values and outputs one by one."""


@dataclass(frozen=True)
class Coefficients:
    """What `fit` finds: ms for an operation or an element on the device that was measured.

    ``slack`` is by how much a step takes longer than its kernels, where the host keeps up with it.
    """

    gemm: float
    attention: float
    sequence: float
    spread: float
    ulysses: float
    ring: float
    slack: float


@dataclass(frozen=True)
class Exchange:
    """What the exchanges of a step take: in all, and what of it nothing hides."""

    total_ms: float
    exposed_ms: float


@dataclass(frozen=True)
class StepCost:
    """What a step is predicted to take."""

    compute_ms: float
    exchange: Exchange

    @property
    def ms(self) -> float:
        return self.compute_ms + self.exchange.exposed_ms


def step_cost(
    work: Workload,
    layout: ParallelismConfig,
    links: Mapping[str, Link],
    device: Device = Device(),
    engine: Engine = OURS,
) -> StepCost:
    """Predict a step.

    Args:
        work: of the model.
        layout: degrees.
        links: of each of the mesh's axes that are split.
        device: all ranks'.
        engine: what computes, and how exchanges are made.
    """
    found = measured_coefficients(engine.blocks)
    attention = found.attention * work.attention_flops / layout.world_size * device.compute
    kernels = (
        found.gemm * work.gemm_flops / layout.world_size * device.compute
        + attention
        + work.attention_elements * np.dot(_rest(found), _rest_shares(layout)) * device.memory
    )
    return StepCost(found.slack * float(kernels), exchange(work, layout, links, attention, engine))


def exchange(
    work: Workload, layout: ParallelismConfig, links: Mapping[str, Link], attention_ms: float, engine: Engine = OURS
) -> Exchange:
    """What the exchanges of a step take.

    Args:
        work: of the model.
        layout: degrees.
        links: of each of the mesh's axes that are split.
        attention_ms: of a rank, which a ring's hops can hide under.
        engine: how exchanges are made.
    """
    total = exposed = 0.0
    local = work.attention_elements / layout.world_size * ELEMENT_BYTES  # of queries: as much of keys, and of values
    if layout.ulysses_size > 1:
        kept = 1 / layout.ulysses_size
        took = links["ulysses"].ms(4 * local * (1 - kept), engine.exchanges * work.attentions)
        total, exposed = total + took, exposed + took * (1 - engine.ulysses_hidden)
    if layout.ring_size > 1:
        hops = layout.ring_size - 1
        took = links["ring"].ms(2 * local * hops, work.attentions * hops)
        hiding = attention_ms * hops / layout.ring_size if engine.ring_hidden else 0.0
        total, exposed = total + took, exposed + max(0.0, took - hiding)
    if layout.tp_size > 1:
        # An all-reduce sends everything but a rank's own share, twice.
        sent = 2 * (1 - 1 / layout.tp_size) * work.reduced_elements / layout.cp_size * ELEMENT_BYTES
        took = links["tp"].ms(sent, work.reductions)
        total, exposed = total + took, exposed + took * (1 - engine.tp_hidden)
    return Exchange(total, exposed)


def fit(rows: Sequence[Mapping[str, Any]], work: Workload) -> Coefficients:
    """Coefficients of compute from measurements of rank 0 alone.

    Args:
        rows: ``ulysses``, ``ring`` and ``tp``, ms of ``gemm``, ``attention`` and ``rest``, and of a whole ``step``.
        work: what was measured.
    """
    layouts = [ParallelismConfig(row["ulysses"], row["ring"], row["tp"]) for row in rows]
    world = np.array([layout.world_size for layout in layouts])
    kinds = {kind: np.array([row[kind] for row in rows]) for kind in ("gemm", "attention", "rest")}
    # Relative errors count, so that layouts of many ranks do, too.
    shares = np.array([_rest_shares(layout) for layout in layouts]) * work.attention_elements
    sequence, spread, ulysses, ring = np.linalg.lstsq(shares / kinds["rest"][:, None], np.ones(len(rows)), rcond=None)[
        0
    ].tolist()
    return Coefficients(
        gemm=float(np.median(kinds["gemm"] * world)) / work.gemm_flops,
        attention=float(np.median(kinds["attention"] * world)) / work.attention_flops,
        sequence=sequence,
        spread=spread,
        ulysses=ulysses,
        ring=ring,
        # The lower quartile: steps of many short kernels wait for the host that launches them.
        slack=float(np.quantile([row["step"] / (row["gemm"] + row["attention"] + row["rest"]) for row in rows], 0.25)),
    )


def _rest(found: Coefficients) -> tuple[float, float, float, float]:
    return found.sequence, found.spread, found.ulysses, found.ring


def _rest_shares(layout: ParallelismConfig) -> tuple[float, float, float, float]:
    """How much of what is neither GEMM nor attention a rank has: see `Coefficients` for the four kinds."""
    return (
        1 / layout.cp_size,
        1 / layout.world_size,
        (layout.ulysses_size > 1) / layout.world_size,
        # Each of a ring's chunks is merged into all of a rank's queries.
        (layout.ring_size > 1) / (layout.ulysses_size * layout.tp_size),
    )


@lru_cache
def measured() -> dict[str, Any]:
    """What `MEASURED` holds: ``device``, ``shape``, and ``rows`` as `fit` takes them, of a ``side`` each."""
    return json.loads(MEASURED.read_text())


@lru_cache
def measured_coefficients(side: str = OURS.blocks) -> Coefficients:
    """Of a side's rows in `MEASURED`."""
    content = measured()
    return fit([row for row in content["rows"] if row["side"] == side], Workload(**content["workload"]))


def uniform(link: Link) -> dict[str, Link]:
    """The same link for every axis."""
    return dict.fromkeys(MESH_AXES, link)
