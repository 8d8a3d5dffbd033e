"""The demo model that comes along: its size and shape, and that it draws what it is asked for, on two ranks."""

import json
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from parallel_backend.config import ParallelismConfig
from parallel_backend.drawing.demo_model import demo_folder, demo_loras
from parallel_backend.drawing.sampling import ImageRequest, draw
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.group_config import ModelConfig
from training.checker import rates
from training.evaluate import held_out, verdicts
from training.lora import DOUBLE, SINGLE

pytestmark = pytest.mark.timeout(180)

MOST_BYTES = 24e6


@pytest.fixture(scope="module")
def group():
    yield acquire_model(ModelConfig.create(demo_folder(), ParallelismConfig(ulysses_size=2), "cpu"))
    close_groups()


def test_size_and_shape():
    weights = list(demo_folder().rglob("*.safetensors"))
    assert 20e6 < sum(file.stat().st_size for file in weights) <= MOST_BYTES
    config = json.loads((demo_folder() / "transformer" / "config.json").read_text())
    assert config["num_attention_heads"] % 8 == 0
    assert config["num_layers"] >= 3
    assert config["num_single_layers"] >= 12
    assert config["guidance_embeds"]
    text = json.loads((demo_folder() / "text_encoder" / "config.json").read_text())
    assert text["text_encoder_out_layers"] == [1, 3, 5]


@pytest.mark.thorough
def test_it_draws_what_it_is_asked_for(group):
    cases = held_out(8, seed=5)
    pictures = [np.asarray(draw(group, ImageRequest(caption.text, 256, 256, steps=8, seed=3))) for _, caption in cases]
    rates_seen = rates(verdicts(pictures, cases))
    # Over 200 prompts 91 % of the things and 86 % of the relations are right; few prompts scatter.
    assert rates_seen["present"] >= 75
    assert rates_seen["relation"] >= 70
    assert rates_seen["background"] == 100


@pytest.mark.parametrize("prompt", ["", "ein Fahrrad im Regen, oil on canvas, 8k", "日本 🚲 \x00"])
def test_unknown_words_still_give_a_picture(group, prompt):
    began = time.perf_counter()
    picture = np.asarray(draw(group, ImageRequest(prompt, width=192, height=320, steps=2, seed=4)))
    assert picture.shape == (320, 192, 3)
    assert time.perf_counter() - began < 40  # 1 s on two cores


def test_the_outline_lora_names_comfyuis_layers():
    file = demo_loras() / "flux2-demo-outline.safetensors"
    assert file.stat().st_size <= 1e6
    tensors = load_file(file)
    config = json.loads((demo_folder() / "transformer" / "config.json").read_text())
    layers = [f"double_blocks.{i}.{name}" for i in range(config["num_layers"]) for name in DOUBLE]
    layers += [f"single_blocks.{i}.{name}" for i in range(config["num_single_layers"]) for name in SINGLE]
    names = {f"diffusion_model.{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    assert set(tensors) == names
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
