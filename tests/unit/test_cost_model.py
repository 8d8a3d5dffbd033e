"""The cost model against figures that others measured, and its bytes against what a rank's collectives are handed."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel_backend.bench import alone
from parallel_backend.bench.model import build_transformer, make_inputs, transformer_config
from parallel_backend.bench.shapes import SHAPES
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_name
from parallel_backend.mesh import build_mesh
from parallel_backend.planning.cost_model import (
    CACHE_DIT,
    Device,
    Engine,
    Link,
    Workload,
    exchange,
    measured,
    measured_coefficients,
    step_cost,
    uniform,
)
from parallel_backend.planning.gpu_speed import NVLINK, PCIE, device_of
from parallel_backend.planning.memory import reference_config
from parallel_backend.planning.workload import count_workload, sample_workload

FLUX2_DEV = Workload(**measured()["workload"])


def layout(*degrees):
    ulysses, ring, tp = degrees
    return ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)


def rows(side):
    return [pytest.param(row, id=row["layout"]) for row in measured()["rows"] if row["side"] == side]


def test_the_workload_is_the_one_that_was_measured():
    family = family_of_name("flux2")
    assert count_workload(family, reference_config(family), 1024, 1024) == FLUX2_DEV
    # Two products of N^2 C multiplications and additions in each of 56 blocks, N = 4096 + 512, C = 6144.
    assert FLUX2_DEV.attention_flops == 4 * 4608**2 * 6144 * 56
    # Row-parallel linears: four in a double-stream block, which make two of each token, and one in a single-stream one.
    assert FLUX2_DEV.reductions == 4 * 8 + 48
    assert FLUX2_DEV.reduced_elements == (2 * 8 + 48) * 4608 * 6144


@pytest.mark.parametrize("row", rows("ours") + rows("diffusers"))
def test_compute_is_what_rank_0_alone_took(row):
    # Rows of many launches were held up by the host, by up to 38 ms; kernels alone are looked at.
    degrees, engine = layout(row["ulysses"], row["ring"], row["tp"]), Engine(blocks=row["side"])
    compute = step_cost(FLUX2_DEV, degrees, uniform(NVLINK), engine=engine).compute_ms
    # 576 tokens of a rank of Ulysses-8 are not whole tiles of a product.
    tolerance = 0.09 if row["layout"] == "Ulysses-8" else 0.05
    kernels = row["gemm"] + row["attention"] + row["rest"]
    assert compute / measured_coefficients(row["side"]).slack == pytest.approx(kernels, rel=tolerance)


# On two H200 over NVLink, eager, by copy engines: ms of a step at 1024 x 1024.
OURS_ON_TWO_GPUS = {"Ulysses-2": 235.8, "TP-2": 237.9, "Ring-2": 231.4}


@pytest.mark.parametrize("row", [row for row in rows("ours") if row.id in OURS_ON_TWO_GPUS])
def test_our_steps_on_two_gpus_are_what_is_predicted(row):
    predicted = step_cost(FLUX2_DEV, layout(row["ulysses"], row["ring"], row["tp"]), uniform(NVLINK)).ms
    assert predicted == pytest.approx(OURS_ON_TWO_GPUS[row["layout"]], rel=0.05)  # 10 % are asked for


# On two H200 over NVLink (NCCL, cache-dit 1.5.3, eager, ms of a step at 1024 x 1024), its kernels of communication on
# rank 0 with compiled blocks, and what a collective took alone.
TWO_GPUS = {"Ulysses-2": (307, 307), "TP-2": (311, 324), "Ring-2": (323, 323)}
EXCHANGED = {"Ulysses-2": 27.0, "TP-2": 19.1}


@pytest.mark.parametrize("row", rows("cache-dit"))
def test_steps_on_two_gpus_are_rank_0_alone_and_the_exchange(row):
    degrees = layout(row["ulysses"], row["ring"], row["tp"])
    found = exchange(FLUX2_DEV, degrees, uniform(NVLINK), row["attention"], CACHE_DIT)
    least, most = TWO_GPUS[row["layout"]]
    assert 0.9 * least <= row["step"] + found.exposed_ms <= 1.1 * most
    if row["layout"] in EXCHANGED:
        assert found.total_ms == pytest.approx(EXCHANGED[row["layout"]], rel=0.1)


def test_the_link_between_two_h200_fits_what_collectives_took():
    size = 4608 * 6144 * 2
    assert NVLINK.ms(size, 1) == pytest.approx(0.27, rel=0.05)  # all-reduce
    assert NVLINK.ms(size * 3 / 4, 1) == pytest.approx(0.22, rel=0.05)  # all-to-all of q, k and v: half of a half
    assert NVLINK.ms(size / 4, 1) == pytest.approx(0.11, rel=0.05)  # of the output


# cache-dit's published seconds for a picture by FLUX.2-dev on eight L20 (PCIe), with the text encoder on all ranks.
L20 = {
    (4, 1, 2): 15.21,
    (2, 2, 2): 16.06,
    (1, 2, 4): 17.13,
    (1, 4, 2): 17.37,
    (2, 1, 4): 17.98,
    (1, 1, 8): 21.37,
    (1, 1, 4): 27.72,
}
STEPS, BESIDE = 28, 2.0
"""Neither is published: its examples' steps for FLUX models, and seconds for text and VAE."""


def l20_seconds(link):
    device = device_of("NVIDIA L20")
    return {
        degrees: STEPS * step_cost(FLUX2_DEV, layout(*degrees), uniform(link), device, CACHE_DIT).ms / 1000 + BESIDE
        for degrees in L20
    }


def test_eight_l20_come_in_the_published_order_and_ratios():
    predicted = l20_seconds(PCIE)
    assert sorted(predicted, key=predicted.get) == list(L20)
    for degrees, seconds in L20.items():
        ratio = predicted[degrees] / predicted[1, 1, 8]
        # 15 % are asked for; the model is within 4.
        assert ratio == pytest.approx(seconds / L20[1, 1, 8], rel=0.06), layout(*degrees).name


def test_the_fitted_bandwidth_of_pcie_is_the_best():
    def worst(bandwidth):
        predicted = l20_seconds(Link(bandwidth, PCIE.latency_ms))
        return max(abs(math.log(predicted[d] / predicted[1, 1, 8] * L20[1, 1, 8] / L20[d])) for d in L20)

    best = min((step / 2 for step in range(16, 80)), key=worst)
    assert best == pytest.approx(PCIE.gb_per_s, rel=0.15)


def test_one_l20_takes_what_is_published_for_flux_1():
    # FLUX.1-dev: 19 double- and 38 single-stream blocks of width 3072, 12 C^2 weights for each token in each of them.
    work = Workload(57 * 4608 * 12 * 3072**2 * 2, 57 * 4 * 4608**2 * 3072, 57, 57 * 4608 * 3072, 0, 0)
    step = step_cost(work, ParallelismConfig(), {}, device_of("NVIDIA L20"), CACHE_DIT).ms
    assert 28 * step / 1000 == pytest.approx(23.56, rel=0.05)


def test_hops_hide_under_attention_until_they_take_longer():
    degrees, work = layout(1, 4, 1), FLUX2_DEV
    fast = exchange(work, degrees, uniform(Link(1000, 0.0)), attention_ms=100)
    assert (fast.exposed_ms, fast.total_ms > 0) == (0, True)
    slow = exchange(work, degrees, uniform(Link(10, 0.0)), attention_ms=100)
    assert slow.exposed_ms == pytest.approx(slow.total_ms - 75)  # of four chunks, three travel


def test_slower_devices_and_links_cost_more():
    degrees = layout(2, 1, 2)
    base = step_cost(FLUX2_DEV, degrees, uniform(NVLINK))
    assert step_cost(FLUX2_DEV, degrees, uniform(PCIE)).ms > base.ms
    assert step_cost(FLUX2_DEV, degrees, uniform(NVLINK), Device(compute=2)).compute_ms > base.compute_ms
    assert step_cost(FLUX2_DEV, degrees, uniform(NVLINK), Device(memory=2)).compute_ms > base.compute_ms


class Counting(alone.AloneGroup):
    """Counts what collectives send, in bytes, and how often they are called."""

    sent: dict = {}  # noqa: RUF012 (of all groups of the process)

    def _count(self, kind, size):
        calls, total = self.sent.get(kind, (0, 0))
        self.sent[kind] = (calls + 1, total + size)

    def alltoall_base(self, out, given, out_sizes, sizes, *rest):
        if sizes and not sizes[0]:  # a hop of the ring: nothing for rank 0 itself, all for the next
            self._count("ring", given.nbytes)
        else:
            self._count("ulysses", given.nbytes * (self.size() - 1) / self.size())
        return super().alltoall_base(out, given, out_sizes, sizes, *rest)

    all_to_all_single = alltoall_base

    def allreduce(self, tensors, *rest):
        self._count("tp", 2 * tensors[0].nbytes * (self.size() - 1) / self.size())
        return super().allreduce(tensors, *rest)


@pytest.mark.parametrize("degrees", [(2, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_bytes_and_calls_are_those_that_a_rank_hands_over(monkeypatch, degrees):
    shape, chosen = SHAPES["tiny"], layout(*degrees)
    work = count_workload(*transformer_config(shape), 128, 128, 64)
    monkeypatch.setattr(alone, "AloneGroup", Counting)
    monkeypatch.setattr(Counting, "sent", {})
    alone.start_alone(chosen.world_size)
    try:
        model = build_transformer(shape, chosen, build_mesh(chosen, "cpu"), torch.bfloat16)
        _, inputs = make_inputs(shape, 128, 128, 64, "cpu", torch.bfloat16)
        Counting.sent.clear()
        with torch.no_grad():
            model(**inputs)
    finally:
        dist.destroy_process_group()
    for axis, degree in (("ulysses", degrees[0]), ("ring", degrees[1]), ("tp", degrees[2])):
        if degree == 1:
            assert axis not in Counting.sent
            continue

        def counted(link, axis=axis):
            other = {"ulysses": 1e30, "ring": 1e30, "tp": 1e30} | {axis: link.gb_per_s}
            latency = {axis: link.latency_ms}
            links = {name: Link(speed, latency.get(name, 0.0)) for name, speed in other.items()}
            return exchange(work, chosen, links, attention_ms=0.0).total_ms

        calls, sent = Counting.sent[axis]
        assert counted(Link(1e30, 1.0)) == pytest.approx(calls)  # 1 ms a call, and nothing for bytes
        assert counted(Link(1e-6, 0.0)) == pytest.approx(sent, rel=1e-6)  # 1 ms a byte


def test_a_prompt_a_gpu_beside_both_on_all_gpus_as_the_docs_have_it():
    wan = family_of_name("wan")
    work = sample_workload(wan, reference_config(wan))

    def seconds(link: Link, **degrees: int) -> float:
        return step_cost(work, ParallelismConfig(**degrees), uniform(link)).ms / 1000

    rows = []
    for link, name in ((NVLINK, "NVLink"), (PCIE, "PCIe 4.0 x16")):
        both = [2 * seconds(link, ulysses_size=2), 2 * seconds(link, ring_size=2), seconds(link)]
        rows.append(f"| two GPUs, {name} | {both[0]:.2f} | {both[1]:.2f} | {both[2]:.2f} |")
        both = [2 * seconds(link, ulysses_size=4), 2 * seconds(link, ring_size=4), seconds(link, ring_size=2)]
        rows.append(f"| four GPUs, {name} | {both[0]:.2f} | {both[1]:.2f} | {both[2]:.2f} (Ring-2 each) |")
    text = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text()
    assert [row for row in rows if row not in text] == []
