"""`enable_cache` and `summary` on diffusers' own pipelines in one process."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, QwenImagePipeline

from parallel_backend import (
    DBCacheConfig,
    ModelAdapter,
    ParallelismConfig,
    TaylorSeerCalibratorConfig,
    disable_cache,
    enable_cache,
    summary,
)
from tests.distributed.cases import flux2_inputs
from tests.tiny_qwen import make_tiny_qwen
from tests.unit.test_block_cache import inputs_at, model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


CONFIG = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1)


def load(kind, folder):
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny_pipeline):
    return load(Flux2Pipeline, tiny_pipeline)


@pytest.fixture(scope="module")
def folders(tiny_pipeline, tmp_path_factory):
    """From a pipeline class to a folder of it."""
    qwen = functools.cache(lambda: make_tiny_qwen(tmp_path_factory.mktemp("models") / "qwen"))
    return lambda kind: tiny_pipeline if kind is Flux2Pipeline else qwen()


def draw(pipe, steps=6, **changes):
    arguments = dict(prompt="a red circle", height=64, width=64, num_inference_steps=steps)
    if isinstance(pipe, QwenImagePipeline):
        arguments |= dict(negative_prompt="blurry", true_cfg_scale=4.0)
    else:
        arguments |= dict(text_encoder_out_layers=(1, 2, 4))
    return pipe(output_type="pt", generator=torch.Generator().manual_seed(1), **arguments, **changes).images


def test_each_picture_is_a_run(pipe):
    plain = draw(pipe)
    calibrator = TaylorSeerCalibratorConfig(1)
    assert enable_cache(pipe, CONFIG, calibrator_config=calibrator) is pipe
    first, report = draw(pipe), summary(pipe)
    assert torch.equal(draw(pipe), first)
    assert not torch.equal(first, plain)
    assert report["cached"] + report["computed"] == report["steps"] == 6
    assert report["cached"] > 0
    assert [e["position"] for e in report["evaluations"]] == [0, 1, 2, 3, 4, 5]
    assert disable_cache(pipe) is pipe
    assert torch.equal(draw(pipe), plain)
    assert "cache_context" not in vars(pipe.transformer)


def interrupted(pipe):
    def stop(pipe, step, *_):
        pipe._interrupt = step == 1
        return {}

    draw(pipe, callback_on_step_end=stop)


def failed(pipe):
    def fail(*_):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        draw(pipe, callback_on_step_end=fail)


def high_half(pipe):
    draw(pipe, steps=2, sigmas=[1.0, 0.9])


@pytest.mark.parametrize(
    ("kind", "stopped"),
    # Qwen-Image's scheduler draws every schedule out to the end, and so has no halves.
    [(kind, stopped) for kind in (Flux2Pipeline, QwenImagePipeline) for stopped in (interrupted, failed)]
    + [(Flux2Pipeline, high_half)],
    ids=lambda value: value.__name__,
)
def test_a_picture_after_one_that_was_stopped_begins_anew(kind, stopped, folders):
    # Which begins below where the other was stopped, as from an image, or as the low half of a schedule.
    low = {"sigmas": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]}
    drawn = []
    for before in (stopped, None):
        pipe = enable_cache(load(kind, folders(kind)), CONFIG, calibrator_config=TaylorSeerCalibratorConfig(1))
        if before is not None:
            before(pipe)
        image = draw(pipe, **low)
        drawn.append((image, [(e["position"], e["computed"]) for e in summary(pipe)["evaluations"]]))
    assert drawn[0][1] == drawn[1][1]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not all(computed for _, computed in drawn[0][1])


def test_a_scheduler_tells_an_adapters_pictures_apart():
    inputs, transformer, scheduler = flux2_inputs(5, [(3, 5)], 1), model(), FlowMatchEulerDiscreteScheduler()
    enable_cache(ModelAdapter(transformer, scheduler=scheduler), CONFIG)
    for sigmas in ([1.0, 0.9, 0.8], [0.7, 0.6, 0.5, 0.4]):
        scheduler.set_timesteps(sigmas=sigmas)
        for timestep in scheduler.timesteps:
            transformer(**{**inputs, "timestep": timestep[None] / 1000})
    report = summary(transformer)
    assert (report["steps"], report["computed"], report["cached"]) == (4, 2, 2)


def test_a_named_mask_gets_its_steps_from_the_scheduler(pipe):
    config = DBCacheConfig(
        Fn_compute_blocks=1, steps_computation_mask="ultra", steps_computation_policy="static", max_warmup_steps=0
    )
    enable_cache(pipe, config)
    draw(pipe, steps=8)
    assert [e["computed"] for e in summary(pipe)["evaluations"]] == [True, *[False] * 2, True, *[False] * 3, True]


def test_named_streams():
    inputs, transformer = flux2_inputs(5, [(3, 5)], 1), model()
    enable_cache(transformer, CONFIG)
    for step in range(4):
        for name in ("cond", "uncond"):
            with transformer.cache_context(name):
                transformer(**inputs_at(step, inputs))
    report = summary(transformer)
    assert report["streams"] == 2
    assert [e["position"] for e in report["evaluations"]] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("options", [{"cache_config": CONFIG}, {"parallelism_config": ParallelismConfig()}])
def test_an_enabled_model_is_not_copied_or_pickled_but_saved_and_loaded(options, tmp_path):
    inputs, transformer = flux2_inputs(5, [(3, 5)], 1), model()
    plain, attributes = copy.deepcopy(transformer), set(vars(transformer))
    enable_cache(transformer, **options)
    for copied in (
        lambda: copy.deepcopy(transformer),
        lambda: copy.deepcopy({"pipe": ModelAdapter(transformer)}),
        lambda: copy.copy(transformer),
        lambda: torch.save(transformer, tmp_path / "whole.pt"),
    ):
        with pytest.raises(ValueError, match=r"this Flux2Transformer2DModel cannot be copied.* call disable_cache on"):
            copied()
    # What is right as it is: weights are saved whole, and others are taken.
    transformer.save_pretrained(tmp_path)
    saved = type(transformer).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved.pop(name), tensor) for name, tensor in plain.state_dict().items())
    assert not saved
    other = {name: tensor * 0.9 for name, tensor in plain.state_dict().items()}
    transformer.load_state_dict(other)
    plain.load_state_dict(other)
    transformer.double(), plain.double()
    inputs = {name: value.double() for name, value in inputs.items()}
    torch.testing.assert_close(transformer(**inputs).sample, plain(**inputs).sample)
    # And what it was afterwards.
    disable_cache(transformer)
    assert set(vars(transformer)) == attributes
    copied = copy.deepcopy(transformer)
    for parameter in copied.parameters():
        parameter.zero_()
    assert torch.equal(transformer(**inputs).sample, plain(**inputs).sample)
    assert not copied(**inputs).sample.any()


def test_refusals():
    transformer = model()
    with pytest.raises(ValueError, match="calibrator_config without cache_config"):
        enable_cache(transformer, calibrator_config=TaylorSeerCalibratorConfig())
    with pytest.raises(ValueError, match="has no cache"):
        summary(transformer)
    with pytest.raises(ValueError, match=r"has 6 blocks; their sum must be at most 5"):
        enable_cache(transformer, DBCacheConfig())
    enable_cache(transformer, CONFIG)
    with pytest.raises(ValueError, match="not seen a run"):
        summary(transformer)
    with pytest.raises(ValueError, match="has a cache already"):
        enable_cache(transformer, CONFIG)
