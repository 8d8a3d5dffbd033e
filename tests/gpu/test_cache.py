"""The block cache on one GPU: the CPU's decisions and pictures, and one host sync where it measures."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from parallel_backend.cache import block_cache
from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.decision import Evaluation
from parallel_backend.mesh import SINGLE
from tests.distributed.cache_cases import STEPS, inputs_at, new_drift, settings
from tests.distributed.cases import FLUX2, flux2_inputs, tiny_transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def run(device, plan):
    """The decisions of a run, and its outputs."""
    transformer, inputs = tiny_transformer(num_single_layers=4).to(device), flux2_inputs(7, [(5, 7), (3, 4)], 2)
    cache, drift = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE), new_drift(inputs)
    outputs, decisions = [], []
    with torch.no_grad():
        for step in range(STEPS):
            moved = {name: value.to(device) for name, value in inputs_at(step, inputs, drift).items()}
            cache.plan(plan, Evaluation("run", "", float(step), STEPS))
            outputs.append(transformer(**moved).sample.cpu())
            decisions.append(cache.last)
    return decisions, outputs


@pytest.mark.parametrize("order", [0, 1])
def test_the_cpus_decisions_and_outputs(order):
    on_cpu, expected = run("cpu", settings(order))
    on_gpu, outputs = run("cuda", settings(order))
    assert 3 <= sum(decision.computed for decision in on_cpu) <= STEPS - 3
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert ours.computed == theirs.computed
        assert ours.diff == (None if theirs.diff is None else pytest.approx(theirs.diff, rel=1e-3))
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # fp32 on both, sums in another order


def test_only_a_measured_step_waits_for_the_device_and_once(monkeypatch):
    waits = []
    monkeypatch.setattr(block_cache, "_to_host", lambda sums: waits.append(sums.shape) or [0.1, 1.0])
    static = settings(1, steps_computation_mask=(1, 1, *(0, 1) * 5), steps_computation_policy="static")
    transformer, inputs = tiny_transformer(num_single_layers=4).cuda(), flux2_inputs(7, [(5, 7)], 1)
    moved = {name: value.cuda() for name, value in inputs.items()}
    cache = BlockCache(transformer, FLUX2.transformer.block_stacks, SINGLE)
    with torch.no_grad():
        transformer(**moved)
        torch.cuda.set_sync_debug_mode("error")  # whatever else waits raises
        try:
            for plan, expected in ((static, 0), (settings(1), STEPS - 2)):
                waits.clear()
                for step in range(STEPS):
                    cache.plan(plan, Evaluation(str(expected), "", float(step), STEPS))
                    transformer(**moved)
                assert len(waits) == expected
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_demo_draws_the_cpus_picture(tmp_path):
    pictures = {}
    for name, device in (("gpu", "0"), ("cpu", "cpu")):
        picture, report = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
        subprocess.run(
            [sys.executable, "-m", "parallel_backend", "demo", "--ulysses", "1", "--tp", "1", "--devices", device,
             "--dtype", "float32", "--steps", "20", "--cache", "speed", "--out", picture, "--report", report],
            check=True, env={**os.environ, "HYBRID_DIT_HOME": str(tmp_path)},
        )  # fmt: skip
        assert json.loads(report.read_text())["cache"]["cached"] > 0
        pictures[name] = np.asarray(Image.open(picture)).astype(int)
    assert np.abs(pictures["gpu"] - pictures["cpu"]).mean() <= 1.0
