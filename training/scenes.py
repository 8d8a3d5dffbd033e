"""Scenes of one to three shapes, what people may say about them, and edits of them. Plain Python, no torch.

A scene is sampled first and then described, so every caption is true. Lengths are in units of the picture's shorter
side, positions in units of its width and height.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (248, 222, 50),
    "green": (40, 160, 65),
    "cyan": (60, 205, 220),
    "blue": (40, 80, 215),
    "purple": (130, 50, 175),
    "pink": (248, 130, 190),
    "brown": (120, 72, 38),
    "white": (246, 246, 246),
    "grey": (140, 140, 140),
    "black": (24, 24, 24),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = {"small": (0.085, 0.105), "medium": (0.13, 0.155), "large": (0.19, 0.225)}
"""Range of the circumscribed radius."""

MARGIN = 0.025
"""Least distance of a shape from the edge and from other shapes."""

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_RELATION_WORDS = {
    "left of": ("left of", "left of", "to the left of", "on the left of"),
    "right of": ("right of", "right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "beneath"),
}
_COLUMN, _ROW = ("left", "", "right"), ("top", "", "bottom")
_JUNK = (
    "beautiful", "4k", "highly detailed", "photo", "nice", "simple", "flat", "vector art", "masterpiece", "please",
    "minimal", "cute", "big sky", "poster", "sharp", "kids drawing", "very", "shiny",
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape: its centre (fractions of width and height), its radius (fraction of the shorter side)."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def place(self) -> tuple[int, int] | None:
        """Row and column (0..2) of a 3 x 3 grid, or None where no one would agree."""
        cells = []
        for value in (self.y, self.x):
            if value < 0.37:
                cells.append(0)
            elif value > 0.63:
                cells.append(2)
            elif 0.43 < value < 0.57:
                cells.append(1)
            else:
                return None
        return cells[0], cells[1]


@dataclass(frozen=True)
class Scene:
    """A background and one to three shapes that do not touch, for a picture of ``height`` x ``width``."""

    background: str
    things: tuple[Thing, ...]
    height: int = 256
    width: int = 256

    @property
    def held_out(self) -> bool:
        """Whether this combination of things and background is kept from training (about one in fifty)."""
        key = ",".join(sorted(f"{t.colour} {t.shape}" for t in self.things)) + self.background
        return zlib.crc32(key.encode()) % 50 == 0


@dataclass(frozen=True)
class Caption:
    """A text and what it claims: things in the order of mention, (i, relation, j) and (i, row, column) claims."""

    text: str
    order: tuple[int, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    places: tuple[tuple[int, int, int], ...] = ()
    names_background: bool = True


def relation(a: Thing, b: Thing, scene: Scene) -> str | None:
    """Which way ``a`` lies of ``b``, or None where both axes differ about as much."""
    dx, dy = (a.x - b.x) * scene.width, (a.y - b.y) * scene.height
    if abs(dx) > 1.35 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.35 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def sample_scene(rng: random.Random, height: int = 256, width: int = 256, held_out: bool = False) -> Scene:
    """Draw a scene; ``held_out`` says from which side of the split."""
    while True:
        count = rng.choices((1, 2, 3), (3, 5, 3))[0]
        background = rng.choice(("white", "grey", "black") if rng.random() < 0.35 else COLOUR_NAMES)
        colours = rng.sample([name for name in COLOUR_NAMES if name != background], count)
        if count > 1 and rng.random() < 0.15:
            colours[1] = colours[0]
        shapes = [rng.choice(SHAPES) for _ in range(count)]
        if len(set(zip(shapes, colours, strict=True))) < count:
            continue
        aligned = count > 1 and rng.random() < 0.7  # most scenes should have relations to speak of
        things = _place(rng, shapes, colours, height, width, aligned)
        if things is not None and (scene := Scene(background, things, height, width)).held_out == held_out:
            return scene


def _place(
    rng: random.Random, shapes: list[str], colours: list[str], height: int, width: int, aligned: bool
) -> tuple[Thing, ...] | None:
    short = min(height, width)
    sizes = [rng.choices(tuple(SIZES), (3, 4, 3 if len(shapes) < 3 else 2))[0] for _ in shapes]
    for _ in range(25):
        things: list[Thing] = []
        for shape, colour, size, (x, y) in zip(shapes, colours, sizes, _positions(rng, len(shapes)), strict=True):
            radius = rng.uniform(*SIZES[size])
            x_edge, y_edge = (radius + MARGIN) * short / width, (radius + MARGIN) * short / height
            x, y = min(max(x, x_edge), 1 - x_edge), min(max(y, y_edge), 1 - y_edge)
            things.append(Thing(shape, colour, size, x, y, radius))
        scene = Scene("white", tuple(things), height, width)
        if all(
            ((a.x - b.x) * width) ** 2 + ((a.y - b.y) * height) ** 2 > ((a.radius + b.radius + MARGIN) * short) ** 2
            and not (aligned and i == 0 and relation(a, b, scene) is None)
            for i, a in enumerate(things)
            for b in things[i + 1 :]
        ):
            return tuple(things)
    return None


def _positions(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Where ``count`` things stand: often in a row or a column through the middle, on a 3 x 3 grid, or anywhere."""
    kind = rng.random()
    if kind < 0.5:
        places = [(step, 0.5) for step in ((0.5,), (0.27, 0.73), (0.19, 0.5, 0.81))[count - 1]]
        places, spread = [(y, x) for x, y in places] if rng.random() < 0.5 else places, 0.03
    elif kind < 0.85:
        places, spread = [(rng.choice((0.22, 0.5, 0.78)), rng.choice((0.22, 0.5, 0.78))) for _ in range(count)], 0.04
    else:
        places, spread = [(0.5, 0.5)] * count, 0.45
    return [(x + rng.uniform(-spread, spread), y + rng.uniform(-spread, spread)) for x, y in places]


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeio" else f"a {words}"


def _noun(rng: random.Random, thing: Thing, with_size: bool) -> str:
    words = f"{thing.colour} {thing.shape}"
    if with_size and thing.size != "medium":
        words = (
            f"{rng.choice(('large', 'large', 'big') if thing.size == 'large' else ('small', 'small', 'tiny'))} {words}"
        )
    elif with_size and rng.random() < 0.4:
        words = f"medium {words}"
    return words if rng.random() < 0.06 else _article(words)


def place_words(rng: random.Random, row: int, column: int) -> str:
    if (row, column) == (1, 1):
        return rng.choice(("in the middle", "in the center", "in the centre"))
    words = f"{_ROW[row]} {_COLUMN[column]}".strip()
    if row == 1:
        return rng.choice((f"on the {words}", f"at the {words}"))
    return rng.choice((f"at the {words}", f"in the {words} corner" if column != 1 else f"at the {words}"))


def describe(rng: random.Random, scene: Scene, noise: bool = True) -> Caption:
    """Say something true about ``scene``; ``noise`` allows junk words and empty prompts."""
    if noise and rng.random() < 0.02:
        return Caption("", (), names_background=False)
    things = scene.things
    order = list(range(len(things)))
    rng.shuffle(order)
    nouns = {i: _noun(rng, thing, rng.random() < 0.6) for i, thing in enumerate(things)}
    relations: list[tuple[int, str, int]] = []
    places: list[tuple[int, int, int]] = []
    text = ""
    between = {(i, j): relation(things[i], things[j], scene) for i in order for j in order if i != j}
    first = order[0]
    if len(things) > 1 and rng.random() < 0.65:
        if len(things) == 2 and between[first, order[1]]:
            relations = [(first, between[first, order[1]] or "", order[1])]
        elif len(things) == 3:
            for name, key in (("from left to right", "x"), ("from top to bottom", "y")):
                row = sorted(order, key=lambda i: getattr(things[i], key))
                gaps = [getattr(things[b], key) - getattr(things[a], key) for a, b in pairwise(row)]
                if min(gaps) > 0.15 and rng.random() < 0.5:
                    order, way = row, "left of" if key == "x" else "above"
                    relations = [(row[0], way, row[1]), (row[1], way, row[2])]
                    text = f"{nouns[row[0]]}, {nouns[row[1]]} and {nouns[row[2]]} {name}"
                    break
            else:
                if between[first, order[1]] and between[first, order[2]]:
                    relations = [(first, between[first, j] or "", j) for j in order[1:]]
        if relations and not text:
            text = nouns[first]
            for index, (_, way, j) in enumerate(relations):
                text += f"{' and' if index else ''} {rng.choice(_RELATION_WORDS[way])} {nouns[j]}"
    if not text:
        with_places = rng.random() < 0.7
        parts = []
        for i in order:
            place = things[i].place if with_places else None
            parts.append(nouns[i] if place is None else f"{nouns[i]} {place_words(rng, *place)}")
            if place is not None:
                places.append((i, *place))
        text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    named = scene.background not in ("white", "grey") or rng.random() < 0.85
    if named:
        background = _article(f"{scene.background} background")
        text = rng.choice((f"{text} on {background}",) * 5 + (f"{text}, {scene.background} background",
                          f"{text} on {scene.background}", f"on {background}, {text}"))  # fmt: skip
    if noise and rng.random() < 0.12:
        text = rng.choice((f"{rng.choice(_JUNK)} {text}", f"{text}, {rng.choice(_JUNK)}", f"a picture of {text}",
                           f"draw {text}", f"{_gibberish(rng)} {text}", f"{text} {_gibberish(rng)}"))  # fmt: skip
    if noise and rng.random() < 0.1:
        text = text[:1].upper() + text[1:] + ("." if rng.random() < 0.5 else "")
    return Caption(text, tuple(order), tuple(relations), tuple(places), named)


def _gibberish(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))


def edit(rng: random.Random, scene: Scene) -> tuple[Scene, str]:
    """One change to ``scene``: the changed scene and the instruction for it."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    same_shape = sum(other.shape == thing.shape for other in scene.things)
    name = f"the {thing.shape}" if same_shape == 1 and rng.random() < 0.6 else f"the {thing.colour} {thing.shape}"
    kind = rng.choices(("colour", "background", "shape", "remove"), (5, 2, 2, 1 if len(scene.things) > 1 else 0))[0]
    if kind == "background":
        taken = {other.colour for other in scene.things} | {scene.background}
        colour = rng.choice([c for c in COLOUR_NAMES if c not in taken])
        words = rng.choice((f"make the background {colour}", f"change the background to {colour}"))
        return replace(scene, background=colour), words
    if kind == "remove":
        return replace(scene, things=_without(scene.things, index)), f"remove {name}"
    if kind == "shape":
        shape = rng.choice([s for s in SHAPES if s != thing.shape])
        changed = replace(thing, shape=shape)
        words = rng.choice((f"turn {name} into {_article(shape)}", f"replace {name} with {_article(shape)}"))
    else:
        colour = rng.choice([c for c in COLOUR_NAMES if c not in (thing.colour, scene.background)])
        changed = replace(thing, colour=colour)
        words = rng.choice((f"make {name} {colour}",) * 3 + (f"change {name} to {colour}", f"color {name} {colour}"))
    things = (*scene.things[:index], changed, *scene.things[index + 1 :])
    return replace(scene, things=things), words


def _without(things: Sequence[Thing], index: int) -> tuple[Thing, ...]:
    return (*things[:index], *things[index + 1 :])


def corpus(count: int = 3000) -> list[str]:
    """Captions and instructions that show a tokenizer all words of this module."""
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(count)]
    return [describe(rng, scene, noise=False).text for scene in scenes] + [edit(rng, scene)[1] for scene in scenes]
