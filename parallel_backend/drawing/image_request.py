"""What is to be drawn: checked, and completed with what suits the model, before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from ..families.drawing import Drawing

MIN_SIDE = 64
"""Smallest width and height, pixels."""


@dataclass(frozen=True)
class ImageRequest:
    """What to draw. None leaves a choice to the model's family.

    Args:
        prompt: may be empty.
        width, height: pixels, multiples of the family's ``pixel_multiple``; by default a megapixel, with the
            proportions of the reference images where the family's pipeline does so.
        steps: evaluations of the transformer, or pairs of them under true CFG.
        seed: of the starting noise.
        guidance: distilled guidance scale, for models that take one.
        cfg: true CFG scale, for models without; 1 is none.
        negative_prompt: with a ``cfg`` above 1.
        images: RGB reference images.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    seed: int = 1
    guidance: float | None = None
    cfg: float | None = None
    negative_prompt: str | None = None
    images: tuple[Image.Image, ...] = ()

    def complete(self, drawing: Drawing) -> CompleteRequest:
        """The request with nothing left open.

        Raises:
            ValueError: what this pipeline cannot draw, with the remedy.
        """
        drawing.check_images(self.images)
        width, height = drawing.default_size(self.images)
        size = {"width": width if self.width is None else self.width}
        size["height"] = height if self.height is None else self.height
        multiple = drawing.transformer.pixel_multiple
        for name, value in size.items():
            if value < MIN_SIDE or value % multiple:
                raise ValueError(
                    f"{name}={value} cannot be drawn; take a multiple of {multiple} pixels, at least {MIN_SIDE}"
                )
        steps = drawing.steps if self.steps is None else self.steps
        if steps < 1:
            raise ValueError(f"steps={steps} cannot be drawn; take at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is out of range; take 0 to {2**63 - 1}")
        guidance, cfg = self._scales(drawing)
        negative = self.negative_prompt
        if cfg is not None and cfg > 1:
            negative = drawing.negative_prompt if negative is None else negative
        elif negative is not None:
            if cfg is None:
                raise ValueError(f"a negative prompt needs true CFG, which {drawing.title} does not have; leave it out")
            raise ValueError(
                f"a negative prompt does nothing with cfg={cfg:g}; take a cfg above 1 (--cfg), or leave it out"
            )
        return CompleteRequest(
            self.prompt, size["width"], size["height"], steps, self.seed, guidance, cfg, negative, self.images
        )

    def _scales(self, drawing: Drawing) -> tuple[float | None, float | None]:
        """Distilled guidance and true CFG."""
        if self.cfg is not None and drawing.cfg is None:
            raise ValueError(
                f"{drawing.title} is guidance-distilled and takes no cfg ({self.cfg:g}); give guidance instead "
                "(--guidance)"
            )
        if self.guidance is not None and drawing.guidance is None:
            raise ValueError(
                f"{drawing.title} takes no distilled guidance ({self.guidance:g}); give cfg instead (--cfg)"
            )
        guidance = drawing.guidance if self.guidance is None else self.guidance
        cfg = drawing.cfg if self.cfg is None else self.cfg
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"guidance={guidance} is no scale; take a number such as {drawing.guidance:g}")
        if cfg is not None and not 1 <= cfg < math.inf:
            raise ValueError(f"cfg={cfg} is no scale; take at least 1, which is none, or about {drawing.cfg:g}")
        return guidance, cfg


@dataclass(frozen=True)
class CompleteRequest:
    """An `ImageRequest` with nothing left open but what the model does not take, which is None."""

    prompt: str
    width: int
    height: int
    steps: int
    seed: int
    guidance: float | None
    cfg: float | None
    negative_prompt: str | None
    images: tuple[Image.Image, ...]


def open_image(path: Path) -> Image.Image:
    """A picture from a file, as RGB, the way up that its camera says.

    Raises:
        ValueError: the file is not there, or no picture.
    """
    if not path.is_file():
        raise ValueError(f"the image {path} is not there")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); take a PNG, JPEG or WebP file") from None
