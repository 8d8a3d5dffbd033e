"""The block cache over a real worker group: the presets' pictures, what is freed, and the demo's own report."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from parallel_backend.cache.config import PRESETS, parse_cache
from parallel_backend.cli import main
from parallel_backend.config import ParallelismConfig
from parallel_backend.drawing.demo_model import demo_folder
from parallel_backend.drawing.sampling import ImageRequest, draw
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.group_config import ModelConfig

pytestmark = pytest.mark.timeout(180)

REQUEST = ImageRequest("a large red circle left of a small blue star on a grey background", 192, 192, steps=20, seed=3)
SHORT = replace(REQUEST, width=64, height=64, steps=2)
"""What shows that workers are as they were, without a cache."""


@pytest.fixture(scope="module")
def group():
    yield acquire_model(ModelConfig.create(demo_folder(), ParallelismConfig(ulysses_size=2), "cpu"))
    close_groups()


@pytest.fixture(scope="module")
def plain(group):
    return np.asarray(draw(group, REQUEST))


@pytest.fixture(scope="module")
def short(group):
    return np.asarray(draw(group, SHORT))


@pytest.mark.thorough
def test_presets_trade_quality_for_speed(group, plain, short):
    psnr, cached = {}, {}
    for name in ("quality", "speed"):
        settings = PRESETS[name]
        picture = np.asarray(draw(group, REQUEST, cache=settings))
        report = group.report()
        psnr[name], cached[name] = peak_signal_noise_ratio(plain, picture), report["cache"]["cached"]
        assert report["cache"]["computed"] + cached[name] == REQUEST.steps
        assert report["cache"]["settings"] == settings.to_dict()
        assert report["cache"]["seconds_saved"] > 0
        assert [rank["cache_bytes"] for rank in report["ranks"]] == [0, 0]  # freed at the end of the run
    assert psnr["quality"] >= 30
    assert psnr["speed"] >= 22
    assert cached["speed"] > cached["quality"] >= 2
    assert np.array_equal(np.asarray(draw(group, SHORT)), short)


def test_a_picture_that_is_given_up_leaves_nothing_at_the_workers(group):
    def give_up(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(group, REQUEST, give_up, cache=PRESETS["quality"])
    assert [rank["cache_bytes"] for rank in group.report()["ranks"]] == [0, 0]


def test_settings_that_leave_nothing_to_skip(group, short):
    with pytest.raises(ValueError, match=r"Fn_compute_blocks=15 .* this Flux2Transformer2DModel has 15 blocks"):
        draw(group, REQUEST, cache=parse_cache("Fn_compute_blocks=15"))
    assert np.array_equal(np.asarray(draw(group, SHORT)), short)


def test_the_demo_reports_its_cache(tmp_path, capsys):
    cache = "Fn_compute_blocks=1,residual_diff_threshold=1,max_warmup_steps=2,taylorseer_order=1"
    layout = ["--ulysses", "1", "--tp", "1", "--devices", "cpu"]
    files = ["--out", str(tmp_path / "demo.png"), "--report", str(tmp_path / "demo.json")]
    assert main(["demo", *layout, "--steps", "6", "--width", "64", "--height", "96", "--cache", cache, *files]) == 0
    assert re.search(
        r"^4 of 6 evaluations from the cache, about [\d.]+ s saved$", capsys.readouterr().out, re.MULTILINE
    )
    report = json.loads((tmp_path / "demo.json").read_text())["cache"]
    assert (report["computed"], report["cached"], report["steps"], report["streams"]) == (2, 4, 6, 1)
    assert [e["computed"] for e in report["evaluations"]] == [True, True, False, False, False, False]
    assert report["settings"] == parse_cache(cache).to_dict()
