"""The demo on one GPU: one rank over NCCL draws what the CPU draws."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def demo(tmp_path, name, *arguments):
    picture, report = tmp_path / f"{name}.png", tmp_path / f"{name}.json"
    command = [sys.executable, "-m", "parallel_backend", "demo", "--ulysses", "1", "--tp", "1", *arguments]
    subprocess.run(
        [*command, "--out", str(picture), "--report", str(report)],
        check=True,
        env={**os.environ, "HYBRID_DIT_HOME": str(tmp_path)},
    )
    return np.asarray(Image.open(picture)).astype(int), json.loads(report.read_text())


def test_one_rank(tmp_path):
    on_gpu, report = demo(tmp_path, "gpu", "--devices", "0", "--dtype", "float32")
    assert report["backend"] == "nccl"
    assert report["ranks"][0]["device"] == "cuda:0"
    assert report["ranks"][0]["peak_bytes"] > sum(report["ranks"][0]["weight_bytes"].values())
    on_cpu, _ = demo(tmp_path, "cpu", "--devices", "cpu")
    # fp32 on both; eight steps of a random model amplify the different order of sums.
    assert np.abs(on_gpu - on_cpu).mean() <= 1.0

    in_bf16, report = demo(tmp_path, "bf16", "--devices", "auto")
    assert report["model"]["dtype"] == "bfloat16"
    assert in_bf16.std() > 5
