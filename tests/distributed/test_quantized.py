"""A transformer in every number format of ComfyUI on every axis: as near to the exact one as on one rank."""

from __future__ import annotations

import pytest
import torch

from parallel_backend import ParallelismConfig
from tests.distributed import adapter_cases, quantized_cases
from tests.errors import relative_error
from tests.quantized_file import FORMATS, NATIVE, needs_kitchen, quantize
from tests.single_file import flux2_tensors, write

pytestmark = needs_kitchen
LAYOUTS = {
    "TP-2": ParallelismConfig(tp_size=2),
    "TP-4": ParallelismConfig(tp_size=4),
    "Ulysses-2": ParallelismConfig(ulysses_size=2),
    "Ring-2": ParallelismConfig(ring_size=2),
    "Ulysses-2-TP-2": ParallelismConfig(ulysses_size=2, tp_size=2),
}
ONE = ParallelismConfig()
TYPICAL = (("int8_convrot", "TP-4"), ("int8_convrot", "Ulysses-2-TP-2"), ("nvfp4", "Ring-2"), ("nvfp4", "TP-4"))
"""Rotated groups that are and are not cut, tiles, and both kinds of products: enough for each change."""
EXACT = 1e-5
"""fp32: the layouts only reorder sums."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Format -> the file's path, and that of the numbers that it stands for; made when asked for."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def file(form):
        if form not in made:
            stored, metadata, meant = quantize(flux2_tensors(heads=4, double=1, single=1), form)
            made[form] = (
                str(write(folder / f"{form}.safetensors", stored, metadata=metadata)),
                str(write(folder / f"{form}-meant.safetensors", meant)),
            )
        return made[form]

    return file


@pytest.fixture(scope="module")
def whole(world, files):
    """Format, file's number and use of its weights -> the prediction of one rank."""
    made = {}

    def predict(form, number, fp8):
        key = form, number, fp8
        if key not in made:
            ((made[key], _, _),) = world.run(quantized_cases.prediction, ONE, files(form)[number], fp8)
        return made[key]

    return predict


@pytest.mark.parametrize(
    ("form", "name"),
    [pytest.param(form, name, marks=[] if (form, name) in TYPICAL else [pytest.mark.thorough])
     for form in FORMATS for name in LAYOUTS],
)  # fmt: skip
def test_as_near_to_the_exact_model_as_one_rank(world, files, whole, form, name):
    path, _ = files(form)
    exact, native = whole(form, 1, "cast"), whole(form, 0, "matmul")
    assert relative_error(whole(form, 0, "stored"), exact) <= EXACT
    rounding = relative_error(native, exact)
    assert (rounding > 100 * EXACT) == (form in NATIVE)
    layout = LAYOUTS[name]
    for prediction, _, _ in world.run(quantized_cases.prediction, layout, path, "stored"):
        assert relative_error(prediction, exact) <= EXACT
    if form not in NATIVE:
        return
    results = world.run(quantized_cases.prediction, layout, path, "matmul", moved=True)
    for prediction, _, _ in results:
        assert torch.equal(prediction, results[0][0]), "on every rank the same"
        # Inputs are quantized in parts, so roundings are others; a part's largest number is no larger than the whole's.
        assert relative_error(prediction, exact) <= 1.3 * rounding
        if layout.tp_size == 1:
            assert relative_error(prediction, native) <= rounding


@pytest.mark.parametrize(
    ("form", "name"),
    [pytest.param(form, name, marks=[] if (form, name) == ("nvfp4", "Ulysses-2-TP-2") else [pytest.mark.thorough])
     for form in FORMATS for name in ("Ring-2", "Ulysses-2-TP-2")],
)  # fmt: skip
def test_replicas_share_the_reading(world, files, form, name):
    layout, (path, _) = LAYOUTS[name], files(form)
    results = world.run(quantized_cases.prediction, layout, path, "stored")
    for tp in range(layout.tp_size):
        replicas = results[tp :: layout.tp_size]
        (held,) = {held for _, _, held in replicas}
        read = [count for _, count, _ in replicas]
        assert 0.99 * held <= sum(read) <= held, "each byte once, by one of them"
        assert max(read) <= 1.5 * held / len(read)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form == "int8_convrot" else [pytest.mark.thorough]) for form in FORMATS]
)
@pytest.mark.parametrize("name", ["one rank", "Ulysses-2-TP-2"])
def test_a_lora_beside_quantized_weights(world, files, form, name):
    for found in world.run(adapter_cases.beside, LAYOUTS.get(name, ONE), files(form)[0]):
        assert found["error"] <= 1e-6
        assert found["count"] == 14
        assert not found["left"]


@pytest.mark.parametrize(
    ("form", "name"),
    [pytest.param(form, name, marks=[] if (form, name) == ("int8_convrot", "TP-4") else [pytest.mark.thorough])
     for form in FORMATS for name in ("one rank", "TP-4", "Ulysses-2-TP-2")],
)  # fmt: skip
def test_adapters_that_are_no_low_rank(world, files, form, name):
    """LoHa, LoKr, DoRA, OFT and differences are of the weights that a file stands for: dense while they are on."""
    for on, wanted, plain, undone in world.run(
        quantized_cases.with_other_patches, LAYOUTS.get(name, ONE), *files(form)
    ):
        assert relative_error(on, wanted) <= EXACT
        assert relative_error(on, plain) > 0.1
        assert undone
