"""Finds shapes in a picture by colour and form (scikit-image), and compares them with what a caption claims."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from skimage.transform import resize

from .render import _distance
from .scenes import COLOUR_NAMES, COLOURS, SHAPES, Caption, Scene

TEMPLATE = 48
LEAST_OVERLAP = 0.76
"""A region whose intersection over union with every form is lower has no form."""


@dataclass(frozen=True)
class Found:
    """A region of one colour; ``shape`` is None where it looks like none of them. Positions as in `Thing`."""

    shape: str | None
    colour: str
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """How many of the (shape, colour) pairs and of the claims of place and relation are in the picture."""

    pairs: int
    pairs_found: int
    claims: int
    claims_true: int
    background: bool


@functools.cache
def _palette() -> np.ndarray:
    return rgb2lab(np.array([[COLOURS[name] for name in COLOUR_NAMES]], dtype=np.float64) / 255)[0]


@functools.cache
def _templates() -> np.ndarray:
    """Each shape drawn large and cropped to its bounding box, ``[shapes, TEMPLATE, TEMPLATE]``."""
    ys, xs = torch.meshgrid(torch.arange(-100, 101.0), torch.arange(-100, 101.0), indexing="ij")
    out = []
    for index in range(len(SHAPES)):
        shape = torch.full((1, 1, 1), float(index))
        mask = (_distance(shape, xs[None], ys[None], torch.full((1, 1, 1), 90.0))[0] < 0).numpy()
        out.append(_crop(mask[np.ix_(mask.any(1), mask.any(0))]))
    return np.stack(out)


def _crop(mask: np.ndarray) -> np.ndarray:
    return resize(mask.astype(np.float32), (TEMPLATE, TEMPLATE), order=1, anti_aliasing=True) > 0.5


def find(picture: np.ndarray) -> tuple[str, list[Found]]:
    """The background's colour and the shapes of ``picture [H, W, 3]`` uint8."""
    lab = rgb2lab(picture)
    distance = np.linalg.norm(lab[:, :, None] - _palette(), axis=-1)
    nearest = distance.argmin(-1)
    border = np.concatenate([nearest[0], nearest[-1], nearest[:, 0], nearest[:, -1]])
    background = int(np.bincount(border, minlength=len(COLOUR_NAMES)).argmax())
    height, width = nearest.shape
    # Half way between a shape's and the background's colour lies the edge. Only the difference from the background
    # makes a region: pixels on an edge have mixed colours that look like other names.
    foreground = np.linalg.norm(lab - _palette()[background], axis=-1) > 14
    found = []
    for region in regionprops(label(foreground, connectivity=1)):
        if region.area < 0.004 * min(height, width) ** 2:
            continue
        rows, columns = region.slice
        colour = int(np.bincount(nearest[rows, columns][region.image], minlength=len(COLOUR_NAMES)).argmax())
        if colour == background:
            continue
        # The edge again, now that both colours are known.
        axis = _palette()[colour] - _palette()[background]
        share = (lab[rows, columns] - _palette()[background]) @ axis / (axis @ axis)
        mask = region.image & (share > 0.5)
        if not mask.any():
            continue
        box = mask[np.ix_(mask.any(1), mask.any(0))]
        shape = None
        if 0.75 < box.shape[0] / box.shape[1] < 1.34:
            crop, templates = _crop(box), _templates()
            overlaps = (crop & templates).sum((1, 2)) / (crop | templates).sum((1, 2))
            shape = SHAPES[int(overlaps.argmax())] if overlaps.max() > LEAST_OVERLAP else None
        y, x = region.centroid
        found.append(Found(shape, COLOUR_NAMES[colour], float(x) / width, float(y) / height))
    return COLOUR_NAMES[background], found


def judge(picture: np.ndarray, scene: Scene, caption: Caption) -> Verdict:
    """Compare ``picture`` with what ``caption`` says about ``scene``."""
    background, found = find(picture)
    left = list(found)
    seen: dict[int, Found] = {}
    for index in caption.order:
        thing = scene.things[index]
        match = next((f for f in left if (f.shape, f.colour) == (thing.shape, thing.colour)), None)
        if match is not None:
            seen[index] = match
            left.remove(match)
    true = sum(i in seen and j in seen and _holds(seen[i], way, seen[j]) for i, way, j in caption.relations)
    true += sum(i in seen and _is_at(seen[i], row, column) for i, row, column in caption.places)
    return Verdict(
        pairs=len(caption.order),
        pairs_found=len(seen),
        claims=len(caption.relations) + len(caption.places),
        claims_true=true,
        background=background == scene.background or not caption.names_background,
    )


def _holds(a: Found, way: str, b: Found) -> bool:
    difference = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}[way]
    return difference > 0.05


def _is_at(found: Found, row: int, column: int) -> bool:
    return all(abs(value - (0.5, 1.5, 2.5)[cell] / 3) < 0.25 for value, cell in ((found.y, row), (found.x, column)))


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares over all ``verdicts``, in percent; ``relation`` counts prompts that claim something, all of it true."""
    claiming = [v for v in verdicts if v.claims]
    return {
        "present": 100 * sum(v.pairs_found for v in verdicts) / max(1, sum(v.pairs for v in verdicts)),
        "relation": 100 * sum(v.claims_true == v.claims for v in claiming) / max(1, len(claiming)),
        "background": 100 * sum(v.background for v in verdicts) / max(1, len(verdicts)),
        "all_right": 100
        * sum(v.pairs_found == v.pairs and v.claims_true == v.claims and v.background for v in verdicts)
        / max(1, len(verdicts)),
    }
