"""Whether a latent's shape is one that a model takes, for messages that say what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence


def latent_problem(shape: Sequence[int], channels: int, dims: int, title: str) -> str:
    """What is wrong with a latent's shape; empty if nothing is.

    Args:
        shape: of the latent, with its batch.
        channels: that the model takes.
        dims: that the model takes: 4, or 5 with frames.
        title: of the model.
    """
    if len(shape) != dims:
        axes = "channels, frames, height, width" if dims == 5 else "channels, height, width"
        kind = {3: " (audio)", 5: " (a video)"}.get(len(shape), "")
        return f"the shape {list(shape)}{kind}, {title} takes [batch, {axes}]"
    if shape[1] != channels:
        return f"{shape[1]} channels, {title} takes {channels}"
    if not all(shape):
        return f"the shape {list(shape)}: there is nothing in it"
    return ""
