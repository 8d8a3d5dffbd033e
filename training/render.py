"""Scenes to pictures by signed distance functions: antialiased, vectorised over a batch, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .scenes import COLOURS, SHAPES, Scene

SLOTS = 3


def to_array(scene: Scene) -> np.ndarray:
    """``[1 + SLOTS, 7]``: the background's colour, then (shape, x, y, radius, r, g, b) in pixels, shape -1 for none."""
    out = np.full((1 + SLOTS, 7), -1.0, dtype=np.float32)
    out[0, 4:] = COLOURS[scene.background]
    for slot, thing in enumerate(scene.things, start=1):
        scale = min(scene.height, scene.width)
        out[slot, :4] = SHAPES.index(thing.shape), thing.x * scene.width, thing.y * scene.height, thing.radius * scale
        out[slot, 4:] = COLOURS[thing.colour]
    return out


def render(
    scenes: Tensor, height: int, width: int, offset: Tensor | None = None, outlined: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw ``scenes [B, 1 + SLOTS, 7]``.

    Args:
        scenes: from :func:`to_array`.
        height: of the window drawn, in pixels.
        width: of the window drawn, in pixels.
        offset: the window's corner (x, y) in each scene, ``[B, 2]``; the scene's own corner if None.
        outlined: whether shapes are drawn as lines along their edges instead of filled.

    Returns:
        Pictures ``[B, 3, height, width]`` in -1..1, and how much of each pixel shapes cover, ``[B, height, width]``.
    """
    device = scenes.device
    ys = torch.arange(height, device=device).view(1, -1, 1) + 0.5
    xs = torch.arange(width, device=device).view(1, 1, -1) + 0.5
    if offset is not None:
        xs, ys = xs + offset[:, 0].view(-1, 1, 1), ys + offset[:, 1].view(-1, 1, 1)
    picture = scenes[:, 0, 4:, None, None].expand(-1, -1, height, width)
    covered = torch.zeros((), device=device)
    for slot in range(1, 1 + SLOTS):
        shape, x, y, radius = (scenes[:, slot, k].view(-1, 1, 1) for k in range(4))
        distance = _distance(shape, xs - x, ys - y, radius)
        if outlined:
            half = 1 + 0.05 * radius
            distance = (distance + half).abs() - half
        cover = (0.5 - distance).clamp(0, 1) * (shape >= 0)
        colour = scenes[:, slot, 4:, None, None]
        picture = torch.lerp(picture, colour.expand_as(picture), cover[:, None].expand_as(picture))
        covered = torch.maximum(covered, cover)
    return picture / 127.5 - 1, covered


def _distance(shape: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to the shape of circumscribed radius ``r`` around the origin, y downwards."""
    radial = torch.sqrt(x * x + y * y + 1e-6)
    side, arm = 0.8 * r, 0.34 * r
    square = torch.maximum(x.abs(), y.abs()) - side
    long, wide = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    cross = torch.maximum(long - 0.94 * r, wide - arm)
    # Upright, its tip at -r; the flat side at r / 2.
    triangle = torch.maximum(x.abs() * math.cos(math.pi / 6) - y * 0.5 - r / 2, y - r / 2)
    # Five tips: fold the plane onto one half tip, then the distance to its one edge.
    fold = math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - 2 * fold * torch.round(angle / (2 * fold))).abs()
    inner = 0.45
    px, py = radial * torch.cos(angle), radial * torch.sin(angle)
    edge_x, edge_y = inner * math.cos(fold) - 1, inner * math.sin(fold)
    star = ((px - r) * -edge_y + py * edge_x) / -math.hypot(edge_x, edge_y)
    ring = (radial - 0.78 * r).abs() - 0.22 * r
    out = radial - r
    for index, distance in enumerate((square, triangle, star, ring, cross), start=1):
        out = torch.where(shape == index, distance, out)
    return out


def render_scenes(scenes: Sequence[Scene]) -> Tensor:
    """Pictures of scenes of one size, ``[B, 3, H, W]`` in -1..1, on the CPU."""
    arrays = torch.from_numpy(np.stack([to_array(scene) for scene in scenes]))
    return render(arrays, scenes[0].height, scenes[0].width)[0]
