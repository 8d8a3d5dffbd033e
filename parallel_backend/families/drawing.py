"""How a diffusers pipeline class draws a picture: what a family states for the command line, beside its models."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .conditioning import Conditioning, VisionImage
from .transformer import Transformer


@dataclass(frozen=True)
class TextInputs:
    """What a text encoder takes for one prompt.

    Args:
        ids, mask: ``[1, L]``, int64.
        images: that the ids refer to.
        drop: tokens of the template at the front, which the context goes without.
    """

    ids: Tensor
    mask: Tensor
    images: tuple[VisionImage, ...] = ()
    drop: int = 0


class Drawing(ABC):
    """What is particular to a pipeline class in drawing a picture; `Family.drawing` makes it.

    Step for step it does what the class of diffusers does.
    """

    title: str
    """The name people know."""
    width = height = 1024
    """Pixels, where nothing is asked for and there are no reference images."""
    steps = 50
    guidance: float | None = None
    """Default of the distilled guidance, a tensor that the transformer takes; None: it takes none."""
    cfg: float | None = None
    """Default of true CFG, which needs a second evaluation with a negative prompt; None: it is not for this model."""
    negative_prompt = " "
    least_images = most_images = 0
    """How many reference images can be given."""
    widest = 8.0
    """The most that one side of a reference image can be of the other."""
    shortest = 1
    """The least a side of a reference image can have, pixels."""
    options: Mapping[str, str] = {}
    """The `Conditioning.options` that make the transformer do what it does in diffusers."""
    needs_processor = False
    """Whether images go through the image processor in the pipeline's ``processor`` folder."""

    scheduler: Mapping[str, Any] | None = None
    """Configuration of the scheduler, for models that come as files; None: those are drawn with in ComfyUI alone."""

    def __init__(self, transformer: Transformer) -> None:
        self.transformer = transformer

    def file_tokenizer(self, content: bytes) -> Any:
        """The tokenizer that a text encoder's file brings along."""
        raise NotImplementedError

    @abstractmethod
    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Give a diffusers scheduler the steps that the pipeline would, for an image of ``tokens`` tokens."""

    def default_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """Width and height (pixels) of a picture for which none are asked; images can tell."""
        return self.width, self.height

    def check_images(self, images: Sequence[Image.Image]) -> None:
        """Raise ValueError for reference images that are too few, too many, too small or too narrow."""
        least, most, count = self.least_images, self.most_images, len(images)
        if count and not most:
            raise ValueError(f"{self.title} takes no reference images, but {count} were given; leave them out")
        if not least <= count <= most:
            takes = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(f"{self.title} takes {takes} reference image(s), but {count} were given")
        for number, (width, height) in enumerate((image.size for image in images), start=1):
            if min(width, height) < self.shortest or max(width, height) > self.widest * min(width, height):
                raise ValueError(
                    f"reference image {number} is {width} x {height}; {self.title} takes sides of at least "
                    f"{self.shortest} pixels, none longer than {self.widest:g} times the other"
                )

    @abstractmethod
    def tokenize(self, tokenizer: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> TextInputs:
        """What the text encoder gets of a prompt and reference images.

        Args:
            tokenizer: of the pipeline.
            processor: of images; None unless it `needs_processor`.
            prompt: may be empty.
            images: RGB; checked.
        """

    def reference_pixels(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Reference images as the VAE takes them, in -1..1, resized: what `VAE.encode` takes."""
        assert not images, f"{self.title} takes no reference images"
        return []

    def conditioning(
        self, context: Tensor, text: TextInputs, references: Sequence[Tensor], guidance: float | None
    ) -> Conditioning:
        """What the transformer is conditioned on.

        Args:
            context: ``[1, L, C]`` of all tokens of ``text``.
            text: which gave it.
            references: latents.
            guidance: distilled guidance scale, if the model takes one.
        """
        tensors = {} if guidance is None else {"guidance": torch.tensor([guidance])}
        return Conditioning(context[:, text.drop :], references, tensors, self.options)

    def combine(self, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        """The prediction under true CFG from those of the prompt and of the negative prompt, of the latent's shape."""
        return uncond + cfg * (cond - uncond)


def size_of_area(area: int, image: Image.Image, multiple: int) -> tuple[int, int]:
    """Width and height of about this area (pixels) with an image's proportions, rounded to a multiple."""
    width = math.sqrt(area * image.width / image.height)
    height = width * image.height / image.width
    return round(width / multiple) * multiple, round(height / multiple) * multiple
