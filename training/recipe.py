"""The numbers that decide the result, and the clock of a run's log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

FULL_COST = 2.4
"""How much longer a step with the full context takes."""

T0 = time.time()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 1
    chunks: tuple[int, int, int] = (80, 3, 12)
    vae_steps: int = 2600
    vae_batch: int = 128
    vae_lr: float = 2e-3
    text_steps: int = 1500
    text_batch: int = 1024
    short_steps: int = 24000
    """Steps with contexts of `CONTEXT` tokens; then come `full_steps` with all 512, as they are in use."""
    full_steps: int = 1600
    short_batch: int = 160
    full_batch: int = 128
    lr: float = 1.5e-3
    decay: float = 0.4
    """The part at the end in which the learning rate goes down to zero."""
    ema: float = 0.998


SMOKE = Recipe(
    chunks=(1, 1, 1), vae_steps=3, vae_batch=4, text_steps=3, text_batch=8, short_steps=3, full_steps=2, short_batch=4,
    full_batch=2,
)  # fmt: skip


def say(*words: Any) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - T0:5.0f}]", *words, flush=True)
