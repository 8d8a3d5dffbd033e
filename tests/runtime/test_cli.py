"""The command line as a user runs it: a picture and a report, or one line that says what to change."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from parallel_backend.cli import main
from parallel_backend.demo_model import demo_folder

pytestmark = pytest.mark.timeout(180)

COMMAND = [sys.executable, "-m", "parallel_backend", "demo"]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return probe.getsockname()[1]


def test_demo_draws_a_picture_and_writes_a_report(tmp_path):
    layout = ["--ulysses", "1", "--ring", "2", "--tp", "1", "--devices", "cpu", "--port", str(free_port())]
    request = ["--steps", "2", "--width", "64", "--height", "96", "--seed", "7"]
    files = ["--out", str(tmp_path / "picture.png"), "--report", str(tmp_path / "report.json")]
    before = sorted(os.listdir(tmp_path))
    command = [*COMMAND, *layout, *request, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "picture.png", "report.json"])

    with Image.open(tmp_path / "picture.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (64, 96))
        assert np.asarray(picture, float).std() > 10

    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layout"] == {"name": "Ring-2", "ulysses": 1, "ring": 2, "tp": 1, "ranks": 2}
    assert report["backend"] == "gloo"
    assert report["model"] == {"family": "flux2", "path": str(demo_folder()), "dtype": "float32"}
    assert set(report["versions"]) == {"hybrid_dit", "torch", "diffusers", "transformers"}
    seconds = report["seconds"]
    assert set(seconds) == {"start", "load", "text", "steps", "step_median", "decode", "total"}
    assert len(seconds["steps"]) == 2
    assert all(step > 0 for step in seconds["steps"])
    assert seconds["total"] > seconds["start"] + seconds["load"] + seconds["text"] + sum(seconds["steps"])
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert set(rank) >= {"rank", "device", "device_name", "weight_bytes", "peak_bytes"}
        assert rank["weight_bytes"]["transformer"] == report["ranks"][0]["weight_bytes"]["transformer"] > 0
    wanted = {"width": 64, "height": 96, "steps": 2, "seed": 7, "guidance": 4.0, "out": str(tmp_path / "picture.png")}
    assert report["request"].items() >= wanted.items()
    assert report["request"]["prompt"]

    # Not on a terminal: a line for each stage, and what it took.
    for stage in ("starting", "loading", "sampling"):
        assert len(re.findall(rf"^{stage} +\[#+\]", done.stdout, re.MULTILINE)) == 1, done.stdout
    assert re.search(r"^rank 1 on cpu: [\d.]+ MiB of weights", done.stdout, re.MULTILINE)
    assert done.stdout.rstrip().endswith(f"wrote {tmp_path / 'picture.png'} and {tmp_path / 'report.json'}")


BAD = {
    "width": (["--width", "70"], "width=70 cannot be drawn; take a multiple of 16 pixels, at least 64"),
    "steps": (["--steps", "0"], "steps=0 cannot be drawn; take at least 1"),
    "degree": (["--ring", "0"], "ring_size must be a whole number of at least 1"),
    "heads": (["--ulysses", "1", "--tp", "3"], "8 attention heads.*these would work.*ulysses=1 tp=1"),
    "picture's folder": (["--out", "nowhere/x.png"], "nowhere/x.png cannot be written: the folder .* does not exist"),
    "report's folder": (["--report", "nowhere/x.json"], "nowhere/x.json cannot be written"),
    "devices": (["--devices", "gpu0"], "cannot read the device 'gpu0'; write 'auto', 'cpu', or GPUs such as '0,1,2,3'"),
    "dtype": (["--dtype", "fp8"], "dtype 'fp8' is not known; choose one of auto, bfloat16, float16, float32"),
    "model": (["--model", "nowhere"], "nowhere is not a folder; name a diffusers pipeline folder"),
    "cache": (["--cache", "quick"], "'quick' is neither a preset .quality, speed. nor name=value"),
    "cache's threshold": (["--cache", "residual_diff_threshold=2"], "residual_diff_threshold must be between 0 and 1"),
    "port": (["--port", "99999", "--devices", "cpu"], "port 99999 cannot be used .*leave the port at 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_input_is_one_line_with_the_remedy(pipeline, tmp_path, monkeypatch, capsys, options, message):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--model", str(pipeline), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("python -m parallel_backend demo: ")
    assert re.search(message, lines[0])
    assert os.listdir(tmp_path) == []


def test_the_exit_status_reaches_the_shell(pipeline, tmp_path):
    options = ["--model", str(pipeline), "--ulysses", "3", "--devices", "cpu"]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "8 attention heads, which do not divide by tp x ulysses = 6" in done.stderr


@pytest.mark.parametrize(("gpus", "expected"), [(0, "auto"), (3, "cpu"), (4, "auto")])
def test_auto_takes_the_cpu_where_gpus_are_too_few(pipeline, monkeypatch, capsys, gpus, expected):
    asked = []

    def create(folder, layout, devices, dtype):
        asked.append(devices)
        raise ValueError("that is enough")

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("parallel_backend.runtime.group_config.ModelConfig.create", create)
    assert main(["demo", "--model", str(pipeline)]) == 2
    assert asked == [expected]
    assert ("4 ranks are more than the 3 GPU(s) here" in capsys.readouterr().out) == (gpus == 3)


def test_without_memfd_the_system_is_named(pipeline, monkeypatch, capsys):
    monkeypatch.delattr("os.memfd_create")
    assert main(["demo", "--model", str(pipeline), "--devices", "cpu"]) == 2
    assert "worker groups need Linux" in capsys.readouterr().err
