"""The cache's rules, masks and forecasts, in plain numbers: nothing here runs a model."""

import json
import re
from dataclasses import replace

import pytest
import torch

from parallel_backend import DBCacheConfig, TaylorSeerCalibratorConfig
from parallel_backend.cache.config import PRESETS, CacheSettings, parse_cache
from parallel_backend.cache.decision import Decision, StreamRules
from parallel_backend.cache.run import CacheRun, summarize
from parallel_backend.cache.step_mask import POLICIES, parse_mask, steps_mask
from parallel_backend.cache.taylorseer import Forecast

MASKS_OF_28 = {
    "slow": "1111111101110011100110010001",
    "medium": "1111110110001100011000110001",
    "fast": "1111110100010000100000100001",
    "ultra": "1111001000001000000100000001",
}


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("Fn_compute_blocks", 0, 1),
        ("Bn_compute_blocks", -1, 0),
        ("residual_diff_threshold", -0.01, 0),
        ("residual_diff_threshold", 1.01, 1),
        ("residual_diff_threshold", "0.1", 0.1),
        ("residual_diff_threshold", float("nan"), 0.5),
        ("max_warmup_steps", -1, 0),
        ("max_warmup_steps", 1.5, 1),
        ("warmup_interval", 0, 1),
        ("max_cached_steps", -2, -1),
        ("max_continuous_cached_steps", -2, -1),
        ("max_continuous_cached_steps", True, 1),
        ("max_accumulated_residual_diff_threshold", -0.1, 0.0),
        ("max_accumulated_residual_diff_threshold", float("nan"), 0.0),
        ("steps_computation_mask", "quick", "fast"),
        ("steps_computation_mask", [1, 2], (1, 0)),
        ("steps_computation_policy", "sometimes", "static"),
        ("num_inference_steps", 0, 1),
    ],
)
def test_wrong_values_are_named(name, bad, good):
    assert getattr(DBCacheConfig(**{name: good}), name) == good
    with pytest.raises(ValueError, match=rf"DBCacheConfig\.{name} must .*; got {re.escape(repr(bad))}"):
        DBCacheConfig(**{name: bad})


def test_defaults_are_the_fields():
    config = DBCacheConfig()
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks, config.residual_diff_threshold) == (8, 0, 0.08)
    assert (config.max_warmup_steps, config.warmup_interval) == (8, 1)
    assert (config.max_cached_steps, config.max_continuous_cached_steps) == (-1, -1)
    assert config.max_accumulated_residual_diff_threshold is None


@pytest.mark.parametrize("order", [0, 5, 1.0])
def test_orders_out_of_range(order):
    with pytest.raises(ValueError, match="taylorseer_order must be 1, 2, 3 or 4"):
        TaylorSeerCalibratorConfig(order)


def test_nothing_left_to_skip():
    DBCacheConfig(Fn_compute_blocks=8, Bn_compute_blocks=6).check_blocks(15, "a model")
    with pytest.raises(ValueError, match=r"Fn_compute_blocks=8 and Bn_compute_blocks=7 .* 15 blocks.* at most 14"):
        DBCacheConfig(Fn_compute_blocks=8, Bn_compute_blocks=7).check_blocks(15, "a model")


@pytest.mark.parametrize("settings", [*PRESETS.values(), CacheSettings(DBCacheConfig(steps_computation_mask=[1, 0]))])
def test_settings_survive_json(settings):
    assert CacheSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("policy", POLICIES)
def test_masks(policy):
    assert "".join(map(str, steps_mask(policy, 28))) == MASKS_OF_28[policy]
    share = sum(steps_mask(policy, 28)) / 28
    for steps in (1, 2, 3, 8, 20, 50, 100):
        mask = steps_mask(policy, steps)
        assert len(mask) == steps
        assert mask[0] == mask[-1] == 1
        assert abs(sum(mask) - share * steps) <= 2


def test_masks_by_hand():
    assert parse_mask(" fast ") == "fast"
    assert parse_mask("") is None
    assert parse_mask("11 0, 1") == (1, 1, 0, 1)
    with pytest.raises(ValueError, match="ones and zeros"):
        parse_mask("1 2")
    with pytest.raises(ValueError, match="num_inference_steps"):
        DBCacheConfig(steps_computation_mask="fast").mask(None)
    assert DBCacheConfig(steps_computation_mask="fast", num_inference_steps=28).mask(None) == steps_mask("fast", 28)


def decide(config: DBCacheConfig, diffs: list[float]) -> str:
    """The decisions for a run whose step i would measure ``diffs[i]``: 1 computed, 0 cached."""
    rules, out = StreamRules(config, len(diffs)), ""
    for index, diff in enumerate(diffs):
        decision = rules.before_measuring(float(index), has_content=index > 0) or rules.after_measuring(diff)
        rules.note(decision)
        out += str(int(decision.computed))
    return out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1100001000"),
        ({"max_warmup_steps": 4}, "1111001000"),
        ({"max_warmup_steps": 5, "warmup_interval": 2}, "1010101000"),
        ({"max_cached_steps": 3}, "1100011111"),
        ({"max_continuous_cached_steps": 2}, "1100101001"),
        ({"max_accumulated_residual_diff_threshold": 0.15}, "1100111111"),
        ({"residual_diff_threshold": 0}, "1111111111"),
        ({"residual_diff_threshold": 1, "max_warmup_steps": 0}, "1000000000"),
        ({"steps_computation_mask": (1, 0, 0, 0, 1, 0, 0, 0, 0, 1), "max_warmup_steps": 8}, "1000101001"),
        (
            {"steps_computation_mask": (1, 0, 0, 0, 1, 0, 0, 0, 0, 1), "steps_computation_policy": "static"},
            "1000100001",
        ),
    ],
)
def test_rules(changes, expected):
    config = DBCacheConfig(**{"residual_diff_threshold": 0.1, "max_warmup_steps": 2, **changes})
    assert decide(config, [0.08, 0.08, 0.08, 0.08, 0.08, 0.08, 1.3, 0.08, 0.08, 0.08]) == expected


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("threshold", [0.08, 1])
def test_a_difference_that_is_no_number_is_computed_and_forgotten(threshold, broken):
    config = DBCacheConfig(max_warmup_steps=0, residual_diff_threshold=threshold)
    rules = StreamRules(replace(config, max_accumulated_residual_diff_threshold=0.1), None)
    assert rules.after_measuring(broken) == Decision(True, None, "not a number")
    assert not rules.after_measuring(0.06).computed
    assert not rules.after_measuring(0.06).computed
    assert rules.before_measuring(3.0, True).reason == "max_accumulated_residual_diff_threshold"


def test_positions_and_settings_are_numbers():
    with pytest.raises(ValueError, match="at step nan of a run; its sigma or timestep is no number"):
        CacheRun(CacheSettings(DBCacheConfig()), [1.0, 0.5, 0.0]).evaluation("", float("nan"))
    limit = DBCacheConfig(max_accumulated_residual_diff_threshold=float("inf"))
    assert limit.max_accumulated_residual_diff_threshold is None


@pytest.mark.parametrize("places", [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 4.0, 6.0]])
def test_a_line_is_forecast_exactly(places):
    forecast = Forecast(1)
    for place in places:
        forecast.update((torch.tensor([2 * place + 3]), torch.tensor([-place])), place)
    line, falling = forecast.at(places[-1] + 2.5)
    assert line.item() == pytest.approx(2 * (places[-1] + 2.5) + 3)
    assert falling.item() == pytest.approx(-places[-1] - 2.5)


def test_orders_of_forecasts():
    def forecast(order: int, count: int) -> float:
        out = Forecast(order)
        for place in range(count):
            out.update((torch.tensor(float(place**2)),), float(place))
        return out.at(count - 1 + 1.0)[0].item()

    assert forecast(0, 5) == 16  # repeats the last
    assert forecast(1, 5) == 16 + 7  # backward difference
    assert forecast(2, 5) == 16 + 7 + 1  # and half the second difference


def test_a_second_evaluation_at_the_same_place_keeps_the_slope():
    forecast = Forecast(1)
    for place, value in ((0.0, 1.0), (1.0, 3.0), (1.0, 3.5)):
        forecast.update((torch.tensor(value),), place)
    assert forecast.at(2.0)[0].item() == pytest.approx(5.5)


def test_positions_in_a_schedule():
    run = CacheRun(PRESETS["quality"], sigmas=[1.0, 0.9, 0.7, 0.4, 0.0])
    assert run.steps == 4
    assert [run.position(sigma) for sigma in (1.0, 0.9, 0.7, 0.4, 0.0)] == [0, 1, 2, 3, 4]
    assert run.position(0.8) == 1.5
    assert run.position(1.2) == 0  # a sampler that adds noise at the start


def test_positions_in_a_rising_schedule():
    run = CacheRun(PRESETS["quality"], sigmas=[0.0, 0.4, 0.7, 0.9, 1.0])
    assert [run.position(sigma) for sigma in (0.0, 0.4, 0.7, 0.9, 1.0)] == [0, 1, 2, 3, 4]
    assert run.position(0.8) == 2.5


def test_settings_on_the_command_line():
    assert parse_cache("speed") is PRESETS["speed"]
    written = parse_cache(
        "Fn_compute_blocks=4, residual_diff_threshold=0.2,taylorseer_order=2,steps_computation_mask=110"
    )
    config = DBCacheConfig(Fn_compute_blocks=4, residual_diff_threshold=0.2, steps_computation_mask=(1, 1, 0))
    assert written == CacheSettings(config, TaylorSeerCalibratorConfig(2))
    with pytest.raises(ValueError, match=r"'fast' is neither a preset \(quality, .*low_noise\) .*warmup_interval"):
        parse_cache("fast")
    with pytest.raises(ValueError, match="Fn_compute_blocks must be"):
        parse_cache("Fn_compute_blocks=0")
    with pytest.raises(ValueError, match="max_warmup_steps must be a whole number; got 'many'"):
        parse_cache("max_warmup_steps=many")


def test_report_and_summary():
    run = CacheRun(CacheSettings(DBCacheConfig(residual_diff_threshold=0.1)), steps=3)
    for index, (computed, diff, seconds) in enumerate([(True, None, 2.0), (False, 0.05, 0.5), (True, 0.3, 2.0)]):
        run.note(run.evaluation("positive", index), Decision(computed, diff, "threshold"), seconds)
    report = run.report()
    assert (report["computed"], report["cached"], report["streams"]) == (2, 1, 1)
    assert report["seconds_saved"] == pytest.approx(1.5)
    assert [e["diff"] for e in report["evaluations"]] == [None, 0.05, 0.3]
    assert "1 of 3 evaluations from the cache, about 1.5 s saved" in summarize(report)
    assert "0.050 to 0.300, threshold 0.1" in summarize(report)
    json.dumps(report)
