"""Training data: scenes and their tokenized captions, made by all cores, then drawn and encoded once on the GPU."""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .models import USED, tokenize
from .render import SLOTS, render, to_array
from .scenes import COLOUR_NAMES, SHAPES, Caption, Scene, describe, edit, sample_scene

CONTEXT = 64
"""Tokens of a prompt in training, the 32 of the chat template included."""

CAPTIONS = 4
"""Different captions of each scene."""

CHUNK = 1000
MAIN = (256, 256)
OTHER_SIZES = ((192, 320), (320, 192), (256, 384), (384, 256), (192, 192), (320, 320), (384, 384))
EDIT_SIZES = (MAIN, (256, 384), (384, 256))


@dataclass
class Texts:
    """Captions of one bucket of scenes: ids padded on the right, their lengths, and what each says."""

    scenes: np.ndarray  # [N, 1 + SLOTS, 7]
    before: np.ndarray | None  # the same before an edit
    ids: np.ndarray  # [N, C, CONTEXT] int16
    lengths: np.ndarray  # [N, C] int16
    labels: np.ndarray  # [N, C, 1 + SLOTS, 5]: shape, colour, x, y, radius in the order of mention; background first


@dataclass
class Bucket:
    """Encoded scenes of one size on the GPU."""

    height: int  # in tokens
    width: int
    latents: Tensor  # [N, height * width, len(USED)]
    weights: Tensor  # [N, height * width] uint8
    references: Tensor | None  # like latents
    ids: Tensor
    lengths: Tensor


_tokenizer: Any = None


def _label(scene: Scene, caption: Caption) -> np.ndarray:
    out = np.full((1 + SLOTS, 5), -1, dtype=np.float32)
    out[1:, 0], out[1:, 1] = len(SHAPES), len(COLOUR_NAMES)
    if caption.names_background:
        out[0, 1] = COLOUR_NAMES.index(scene.background)
    for slot, index in enumerate(caption.order, start=1):
        thing = scene.things[index]
        out[slot] = SHAPES.index(thing.shape), COLOUR_NAMES.index(thing.colour), thing.x, thing.y, thing.radius * 4
    return out


def _chunk(job: tuple[int, int, int, bool]) -> Texts:
    seed, height, width, is_edit = job
    rng = random.Random(seed)
    scenes = [sample_scene(rng, height, width) for _ in range(CHUNK)]
    if is_edit:
        after, prompts = zip(*(edit(rng, scene) for scene in scenes), strict=True)
        captions = [[Caption(text, ())] for text in prompts]
    else:
        after, captions = scenes, [[describe(rng, scene) for _ in range(CAPTIONS)] for scene in scenes]
    tokens = tokenize(_tokenizer, [caption.text for group in captions for caption in group])
    ids = np.zeros((len(tokens), CONTEXT), dtype=np.int16)
    lengths = np.zeros(len(tokens), dtype=np.int16)
    for row, values in enumerate(tokens):
        kept = values if len(values) <= CONTEXT else [*values[: CONTEXT - 1], values[-1]]
        ids[row, : len(kept)], lengths[row] = kept, len(kept)
    count = len(captions[0])
    return Texts(
        scenes=np.stack([to_array(scene) for scene in after]),
        before=np.stack([to_array(scene) for scene in scenes]) if is_edit else None,
        ids=ids.reshape(CHUNK, count, CONTEXT),
        lengths=lengths.reshape(CHUNK, count),
        labels=np.stack([[_label(s, c) for c in group] for s, group in zip(scenes, captions, strict=True)]),
    )


def make_texts(tokenizer: Any, seed: int, chunks: tuple[int, int, int]) -> dict[tuple[int, int, bool], Texts]:
    """All buckets of scenes with captions. Call it before CUDA is initialized, since it forks.

    Args:
        tokenizer: from `build_tokenizer`.
        seed: decides everything.
        chunks: thousands of scenes of 256 x 256, of each other size, and of edits of each size.
    """
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    wanted = {(*MAIN, False): chunks[0]}
    wanted |= {(*size, False): chunks[1] for size in OTHER_SIZES}
    wanted |= {(*size, True): chunks[2] if size == MAIN else -(-chunks[2] // 6) for size in EDIT_SIZES}
    wanted = {key: count for key, count in wanted.items() if count}
    keys = [key for key, count in wanted.items() for _ in range(count)]
    jobs = [(seed * 1_000_003 + index, *key) for index, key in enumerate(keys)]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("fork")) as pool:
        parts = list(pool.map(_chunk, jobs))
    out = {}
    for key in wanted:
        mine = [part for part, its_key in zip(parts, keys, strict=True) if its_key == key]
        out[key] = Texts(*(
            None if getattr(mine[0], name) is None else np.concatenate([getattr(part, name) for part in mine])
            for name in Texts.__dataclass_fields__
        ))  # fmt: skip
    return out


def patchify(latents: Tensor) -> Tensor:
    """``[B, 32, 2h, 2w] -> [B, h * w, 128]``, as Flux2Pipeline orders channels."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, height * width // 4, channels * 4)


@torch.no_grad()
def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """The mode of the latents as tokens ``[B, S, 128]``, not normalized. ``vae`` may be of any dtype."""
    parameter = next(vae.parameters())
    return patchify(vae.encode(pictures.to(parameter)).latent_dist.mode()).float()


@torch.no_grad()
def encode_bucket(
    vae: Any, key: tuple[int, int, bool], texts: Texts, device: Any, batch: int = 125, outlined: bool = False
) -> Bucket:
    height, width, _ = key
    mean, std = vae.bn.running_mean.float(), (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
    tokens = (len(texts.scenes), height * width // 256, len(USED))
    latents = torch.empty(tokens, dtype=torch.bfloat16, device=device)
    references = torch.empty_like(latents) if texts.before is not None else None
    weights = torch.empty(tokens[:2], dtype=torch.uint8, device=device)
    for arrays, out in ((texts.before, references), (texts.scenes, latents)):
        if arrays is None or out is None:
            continue
        for start in range(0, len(arrays), batch):
            part = torch.from_numpy(arrays[start : start + batch]).to(device)
            picture, covered = render(part, height, width, outlined=outlined)
            picture = picture.contiguous(memory_format=torch.channels_last)
            out[start : start + batch] = ((encode_pictures(vae, picture) - mean) / std)[..., list(USED)]
            touched = nn.functional.max_pool2d(covered[:, None], 16).flatten(1) > 0
            weights[start : start + batch] = 1 + 2 * touched.to(torch.uint8)
    ids, lengths = torch.from_numpy(texts.ids).to(device), torch.from_numpy(texts.lengths).to(device)
    return Bucket(height // 16, width // 16, latents, weights, references, ids, lengths)
