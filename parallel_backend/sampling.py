"""Text to image over a worker group, step for step as diffusers' pipeline does it in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .cache.config import CacheSettings
from .cache.run import CacheRun
from .families import Conditioning
from .runtime.remote_model import RemoteModel

MAX_TEXT_TOKENS = 512
"""Length that diffusers pads a prompt to."""
MIN_SIDE = 64
"""Smallest width and height, pixels: four latent positions."""


@dataclass(frozen=True)
class ImageRequest:
    """What to draw.

    Args:
        prompt: may be empty.
        width, height: pixels, multiples of the model's latent downscale.
        steps: evaluations of the transformer.
        seed: of the starting noise.
        guidance: distilled guidance scale.
    """

    prompt: str
    width: int = 256
    height: int = 256
    steps: int = 8
    seed: int = 1
    guidance: float = 4.0

    def check(self, downscale: int) -> None:
        """Raise ValueError for a size, number of steps or seed that cannot be drawn."""
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < MIN_SIDE or value % downscale:
                raise ValueError(
                    f"{name}={value} cannot be drawn; take a multiple of {downscale} pixels, at least {MIN_SIDE}"
                )
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} cannot be drawn; take at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is out of range; take 0 to {2**63 - 1}")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a pipeline folder."""
    return AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")


def load_scheduler(folder: str | Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "scheduler"
    if not (path / "scheduler_config.json").is_file():
        raise ValueError(f"{path / 'scheduler_config.json'} is missing: the pipeline is incomplete; download it again")
    return FlowMatchEulerDiscreteScheduler.from_pretrained(path)


def draw(
    model: RemoteModel,
    request: ImageRequest,
    on_step: Callable[[int, int], None] = lambda *_: None,
    cache: CacheSettings | None = None,
) -> Image.Image:
    """Draw one picture.

    Args:
        model: a pipeline in a worker group.
        request: what to draw.
        on_step: told the steps done and the steps in all.
        cache: of the transformer's blocks; None computes each step in full.

    Raises:
        ValueError: a request that cannot be drawn.
    """
    family, folder = model.source.family, model.source.path
    request.check(family.latent_downscale)
    tokens = load_tokenizer(folder).apply_chat_template(
        [family.messages(request.prompt)],
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=MAX_TEXT_TOKENS,
    )
    context = model.encode_text(tokens["input_ids"], tokens["attention_mask"])

    shape = (1, family.latent_channels, *(side // family.latent_downscale for side in (request.height, request.width)))
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float32)
    scheduler = load_scheduler(folder)
    family.set_timesteps(scheduler, request.steps, shape[2] * shape[3])
    conditioning = Conditioning(context, tensors={"guidance": torch.tensor([request.guidance])})
    run = None if cache is None else CacheRun(cache, steps=request.steps)
    on_step(0, request.steps)
    for index, timestep in enumerate(scheduler.timesteps):
        plan = None if run is None else (run, run.evaluation("", index))
        prediction = model.predict(latent, timestep.expand(1) / 1000, conditioning, cache=plan)
        latent = scheduler.step(prediction.float(), timestep, latent, return_dict=False)[0]
        on_step(index + 1, request.steps)
    if run is not None:
        model.end_run(run)
    return to_picture(model.decode(latent))


def to_picture(image: torch.Tensor) -> Image.Image:
    """The first image of ``[B, 3, H, W]`` in -1..1 as 8-bit RGB."""
    pixels = ((image[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.astype(np.uint8))
