"""The report on a model in a worker group: what it is and what it took. docs/report.md explains every field."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ... import __version__
from ..group_config import ModelConfig


def make_report(
    config: ModelConfig,
    family: str,
    seconds: Mapping[str, Any],
    ranks: list[dict[str, Any]],
    cache: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put a report together.

    Args:
        config: of the model.
        family: name of the model family.
        seconds: ``start``, ``imports``, ``load`` and ``first_step``, and lists of ``text``, ``steps``, ``workers`` and
            ``decode``.
        ranks: each rank's own figures, in rank order.
        cache: the last run that used the block cache.
    """
    layout = config.layout
    steps = list(seconds["steps"])
    median = statistics.median(steps) if steps else None
    compiled = config.speed.compile and median is not None and len(steps) > 1
    return {
        "layout": {
            "name": layout.name,
            "ulysses": layout.ulysses_size,
            "ring": layout.ring_size,
            "tp": layout.tp_size,
            "ranks": layout.world_size,
        },
        "backend": "nccl" if config.devices.kind == "cuda" else "gloo",
        "model": {"family": family, "path": config.path, "dtype": config.dtype},
        "speed": asdict(config.speed),
        "versions": {
            "hybrid_dit": __version__,
            "torch": torch.__version__,
            "diffusers": importlib.metadata.version("diffusers"),
            "transformers": importlib.metadata.version("transformers"),
        },
        "seconds": {
            "start": seconds["start"],
            "imports": seconds["imports"],
            "load": seconds["load"],
            "text": sum(seconds["text"]),
            "steps": steps,
            "step_median": median,
            "compile": max(0.0, seconds["first_step"] - median) if compiled else None,
            "workers": list(seconds["workers"]),
            "decode": sum(seconds["decode"]),
        },
        "cache": cache,
        "ranks": ranks,
    }


def took(start: float, imports: float, load: float, compiled: float | None) -> str:
    """Seconds of what comes before the first picture, for people; ``compiled`` is None where nothing was."""
    text = f"started in {start:.1f} s (imports {imports:.1f}), loaded in {load:.1f} s"
    return text if compiled is None else f"{text}, compiled in {compiled:.1f} s"
