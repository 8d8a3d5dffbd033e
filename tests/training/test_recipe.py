"""The recipe of the demo model: captions are true, the checker sees what was drawn, both hosts' contexts agree."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, format_input

from training import models
from training.muon import orthogonalize
from training.render import render_scenes
from training.scenes import OPPOSITE, describe, edit, relation, sample_scene

PROMPTS = ("a red circle left of a small blue star on a grey background", "", "zxq wibble, 4k")


@pytest.fixture(scope="module")
def tokenizer():
    return models.build_tokenizer()


def test_captions_are_true_and_splits_are_apart():
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(50):
            scene = sample_scene(rng, held_out=held_out)
            assert scene.held_out is held_out
            for i, way, j in describe(rng, scene).relations:
                a, b = scene.things[i], scene.things[j]
                assert relation(a, b, scene) in (way, None) or len(scene.things) == 3
                assert (a.x - b.x if way.endswith("of") else a.y - b.y) * (
                    1 if way in ("right of", "below") else -1
                ) > 0


def test_relations_have_opposites():
    scene = sample_scene(random.Random(1))
    for a in scene.things:
        for b in scene.things:
            way = relation(a, b, scene)
            assert a is b or way is None or relation(b, a, scene) == OPPOSITE[way]


def test_edits_change_the_scene():
    rng = random.Random(2)
    for _ in range(50):
        scene = sample_scene(rng)
        changed, words = edit(rng, scene)
        assert changed != scene
        assert words


def test_checker_sees_what_was_drawn():
    pytest.importorskip("skimage")
    from training.checker import judge, rates

    rng = random.Random(3)
    verdicts = []
    for size in ((256, 256), (192, 320), (384, 256)):
        for _ in range(15):
            scene = sample_scene(rng, *size)
            picture = ((render_scenes([scene])[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
            verdicts.append(judge(picture, scene, describe(rng, scene, noise=False)))
    assert all(rate >= 99 for rate in rates(verdicts).values())


def test_tokens_are_those_of_the_chat_template(tokenizer):
    for prompt, ids in zip(PROMPTS, models.tokenize(tokenizer, PROMPTS), strict=True):
        messages = format_input([prompt])[0]
        theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert ids == theirs


def test_contexts_agree(tokenizer):
    torch.manual_seed(0)
    encoder = models.build_text_encoder(tokenizer)
    tokens = models.tokenize(tokenizer, PROMPTS)
    ids = torch.zeros(len(tokens), 64, dtype=torch.long)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = torch.tensor(values)
    lengths = torch.tensor([len(values) for values in tokens])
    with torch.no_grad():
        ours = torch.nn.functional.pad(models.encode_text(encoder, ids, lengths), (0, 0, 448, 0))
        theirs = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
            encoder, tokenizer, list(PROMPTS), hidden_states_layers=models.SIZE.text_out_layers
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(models.encode_padded(encoder, ids, lengths), theirs, rtol=1e-4, atol=1e-4)


def test_orthogonalize():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 96, 32)).float())
    assert values.min() > 0.5
    assert values.max() < 1.5
