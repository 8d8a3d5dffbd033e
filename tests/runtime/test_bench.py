"""The bench command on the CPU: on real ranks and on rank 0 alone, and what it refuses before it starts any."""

import json

import pytest
import torch

from parallel_backend.bench.model import fill, transformer_config
from parallel_backend.bench.quantized import quantize
from parallel_backend.bench.shapes import SHAPES, WEIGHTS
from parallel_backend.cli import main
from parallel_backend.parallel.products import product_of
from tests.errors import relative_error
from tests.quantized_file import needs_kitchen

pytestmark = pytest.mark.timeout(180)
TINY = ["bench", "--shape", "tiny", "--device", "cpu", "--steps", "3"]


def weights_of_tiny() -> int:
    """Bytes of the whole transformer in fp32."""
    family, config = transformer_config(SHAPES["tiny"])
    return 4 * sum(p.numel() for p in family.transformer.build(config).parameters())


def bench(tmp_path, *arguments):
    out = tmp_path / "out.json"
    assert main([*TINY, *arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_real_ranks(tmp_path, capsys):
    report = bench(tmp_path, "--ulysses", "2", "--cache", "steps_computation_mask=101,steps_computation_policy=static,"
                   "max_warmup_steps=0,Fn_compute_blocks=1")  # fmt: skip
    assert (report["layout"], report["device"], report["torch"]) == ("Ulysses-2", "CPU", torch.__version__)
    assert len(report["ranks"]) == 2
    for rank in report["ranks"]:
        assert len(rank["step_ms"]) == 3
        assert rank["step"]["least"] <= rank["step"]["median"] <= rank["step"]["most"]
        assert rank["text_s"] > 0
        assert rank["compile_s"] is None
        assert rank["weight_bytes"]["transformer"] == weights_of_tiny()
        assert rank["cache"]["computed"] == 2
        assert rank["cache"]["cached"] == 1
        assert rank["cache"]["cached_ms"] < rank["cache"]["computed_ms"]
        ms = rank["profile"]["ms"]
        assert min(ms["GEMM"], ms["attention"], ms["communication"], ms["rest"]) > 0
    # fp32 sums in another order.
    assert 0 < report["ranks"][0]["one_gpu"]["error"] <= 1e-5
    assert report["ranks"][1]["one_gpu"] is None
    said = capsys.readouterr().out
    assert "2 steps computed" in said
    assert "relative error" in said


def test_rank_0_of_a_world_that_is_not_there(tmp_path, capsys):
    report = bench(tmp_path, "--tp", "8", "--rank-only")
    (rank,) = report["ranks"]
    assert 1 / 8 < rank["weight_bytes"]["transformer"] / weights_of_tiny() < 1 / 2  # embedders are not split
    assert "one_gpu" not in rank
    assert rank["profile"]["ms"]["communication"] == 0
    assert "rank 0 alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ulysses", "3"], "8 attention heads, which do not divide"),
        (["--tp", "0"], "tp_size must be a whole number of at least 1"),
        (["--width", "100"], "width and height are multiples of 16 pixels"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--cache", "fast"], "neither a preset"),
        (["--json", "/nowhere/out.json"], "the folder /nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_said_before_a_rank_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("parallel_backend.cli.bench.run_ranks", None)
    assert main([*TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_too_few_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "--shape", "tiny", "--tp", "2", "--device", "cuda"]) == 2
    assert "TP-2 needs 2 GPU(s), this machine has 1" in capsys.readouterr().err


def test_a_rank_that_fails_is_quoted(capsys, monkeypatch):
    monkeypatch.setattr("parallel_backend.cli.bench.make_task", lambda _: broken())
    assert main(TINY) == 1
    assert "no shape 'flux3' to time" in capsys.readouterr().err


def broken():
    from parallel_backend.bench.rank import Task

    return Task("flux3", 1, 1, 1, 128, 128, 3, "cpu", "float32", 64)


@needs_kitchen
@pytest.mark.parametrize(
    "weights",
    [pytest.param(name, marks=[] if name == "int8_convrot" else [pytest.mark.thorough]) for name in WEIGHTS],
)
def test_quantized_weights(tmp_path, capsys, weights):
    report = bench(tmp_path, "--tp", "2", "--weights", weights)
    # Off a format's grid they stay as they are: no rank of so small a model has half a tile of 128 x 128.
    for rank in report["ranks"]:
        assert rank["weight_bytes"]["transformer"] < (0.5 if weights != "mxfp8" else 0.75) * weights_of_tiny()
    # The same weights on both ranks as on one; formats that round inputs do it in parts, and of nvfp4's tiles a rank
    # has no whole ones, where it keeps exact weights.
    rounded = {"int8": 0.05, "int8_convrot": 0.05, "nvfp4": 0.2, "mxfp8": 0.05, "w4a8": 0.05, "w4a4": 0.5}
    assert report["ranks"][0]["one_gpu"]["error"] <= rounded.get(weights, 1e-5)
    assert f"weights in {weights}" in capsys.readouterr().out


def rotate(weight, group):
    from comfy_kitchen.backends.eager.convrot_w4a4 import _build_hadamard

    return (weight.view(len(weight), -1, group) @ _build_hadamard(group)).view(weight.shape)


@needs_kitchen
@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name != "fp8 as storage"])
def test_numbers_are_those_of_the_weights(weights):
    """Dense again they are what was quantized, but for the format's rounding: as files have them."""
    model = torch.nn.ModuleDict({"0": torch.nn.Linear(512, 256, bias=False)})
    fill(model, torch.device("cpu"), torch.float32)
    exact = model["0"].weight.data.clone()
    quantize(model, weights, {}, torch.float32)
    product = product_of(model["0"])
    dense = product.dense(torch.float32)
    if weights in ("int8_convrot", "w4a8", "w4a4"):
        # They stand for rotated columns: rotated once more they are the weight.
        dense = rotate(dense, 256)
    least, most = {
        "int8": (0.001, 0.02),
        "int8_convrot": (0.001, 0.02),
        "fp8": (0.01, 0.05),
        "mxfp8": (0.01, 0.05),
    }.get(weights, (0.05, 0.25))
    assert least <= relative_error(dense, exact) <= most


def test_quantized_weights_without_the_library(capsys, monkeypatch):
    monkeypatch.setattr("parallel_backend.parallel.kitchen.has_kitchen", lambda: False)
    assert main([*TINY, "--weights", "int8"]) == 2
    assert "need comfy-kitchen: pip install" in capsys.readouterr().err
