"""The demo on two GPUs over NCCL, on each layout of two ranks: the CPU's picture, and fp32 parity of a short run."""

import numpy as np
import pytest
import torch

from .test_demo import demo

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return folder, demo(folder, "cpu", "--devices", "cpu", "--width", "208", "--height", "272")[0]


@pytest.mark.parametrize("axis", ["ulysses", "ring", "tp"])
def test_two_ranks(axis, on_cpu, tmp_path):
    folder, expected = on_cpu
    degrees = {name: "2" if name == axis else "1" for name in ("ulysses", "ring", "tp")}
    options = [word for name, degree in degrees.items() for word in (f"--{name}", degree)]
    size = ["--width", "208", "--height", "272"]
    picture, report = demo(folder, axis, *options, *size, "--devices", "0,1", "--dtype", "float32")
    assert report["backend"] == "nccl"
    assert [rank["device"] for rank in report["ranks"]] == ["cuda:0", "cuda:1"]
    # fp32 on both sides; only the order of sums differs, and the random model amplifies that over eight steps.
    assert np.abs(picture - expected).mean() <= 1.0
