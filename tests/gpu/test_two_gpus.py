"""Two GPUs over NCCL, on each layout of two ranks: the CPU's picture, and bf16 no worse than on one GPU."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from .nccl_cases import SPEEDS
from .test_demo import demo

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

WORSE = 1.1
"""How much larger the error of bf16 on two GPUs may be than on one."""
LAYOUTS = ("Ulysses-2", "Ring-2", "TP-2")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return folder, demo(folder, "cpu", "--devices", "cpu", "--width", "208", "--height", "272")[0]


@pytest.mark.parametrize("fast", [[], ["--compile", "--cuda-graphs", "--copy-engines"]], ids=["as_it_is", "fast"])
@pytest.mark.parametrize("axis", ["ulysses", "ring", "tp"])
def test_two_ranks(axis, fast, on_cpu, tmp_path):
    folder, expected = on_cpu
    degrees = {name: "2" if name == axis else "1" for name in ("ulysses", "ring", "tp")}
    options = [word for name, degree in degrees.items() for word in (f"--{name}", degree)]
    size = ["--width", "208", "--height", "272"]
    picture, report = demo(folder, axis, *options, *size, *fast, "--devices", "0,1", "--dtype", "float32")
    assert report["backend"] == "nccl"
    assert [rank["device"] for rank in report["ranks"]] == ["cuda:0", "cuda:1"]
    # fp32 on both sides; only the order of sums differs.
    assert np.abs(picture - expected).max() <= 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("nccl") / "found.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "tests.gpu.nccl_cases", str(path)], check=True, timeout=550)
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["flux2", "qwen_image"])
def test_bf16_is_as_good_as_on_one_gpu(found, family, layout):
    errors = found[family]["errors"]
    assert errors[f"{layout} fp32"] <= 1e-5
    assert errors[layout] <= WORSE * errors["one"]
    for speed in SPEEDS:
        assert errors[f"{layout}, {speed}"] <= WORSE * errors["one"], speed


def test_copy_engines_bring_what_nccl_brings(found):
    assert found["exchanges"]["compared"] > 100
    assert found["exchanges"]["different"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["flux2", "qwen_image"])
def test_the_ranks_cache_alike(found, family, layout):
    first, second = found[family]["decisions"][layout]
    assert first == second
    assert not all(first), "nothing was cached"
    assert first[5], "the inputs changed"


def test_text_encoder(found):
    errors = found["text_encoder"]
    assert errors["two"] <= WORSE * errors["one"]
