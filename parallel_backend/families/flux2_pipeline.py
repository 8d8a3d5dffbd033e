"""How `Flux2Pipeline` draws: a chat template padded to a fixed length, distilled guidance, references of any number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from .drawing import Drawing, TextInputs

MAX_TEXT_TOKENS = 512
"""Length that diffusers pads a prompt to."""
REFERENCE_AREA = 1024 * 1024
"""Reference images with more pixels are made smaller."""


def conversation(prompt: str) -> list[dict[str, Any]]:
    """What the tokenizer's chat template turns into the text encoder's input."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    return format_input([prompt])[0]


class Flux2Drawing(Drawing):
    """FLUX.2-dev: 50 steps, distilled guidance 4; reference images keep their size up to a megapixel."""

    title = "FLUX.2"
    guidance = 4.0
    most_images = 10  # as Black Forest Labs has it; diffusers does not count
    widest, shortest = 8.0, 64

    def default_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        return self._reference_size(images[0])[1] if images else (self.width, self.height)

    def tokenize(self, tokenizer: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> TextInputs:
        tokens = tokenizer.apply_chat_template(
            [conversation(prompt)],
            add_generation_prompt=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=MAX_TEXT_TOKENS,
        )
        return TextInputs(tokens["input_ids"], tokens["attention_mask"])

    def reference_pixels(self, images: Sequence[Image.Image]) -> list[Tensor]:
        from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

        processor = Flux2ImageProcessor(vae_scale_factor=self.family.pixel_multiple)
        pixels = []
        for image in images:
            resized, (width, height) = self._reference_size(image)
            pixels.append(processor.preprocess(resized, height=height, width=width, resize_mode="crop"))
        return pixels

    def _reference_size(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """A reference image of at most `REFERENCE_AREA`, and the width and height that its middle is cropped to."""
        if image.width * image.height > REFERENCE_AREA:
            from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

            image = Flux2ImageProcessor._resize_to_target_area(image, REFERENCE_AREA)
        multiple = self.family.pixel_multiple
        return image, (image.width // multiple * multiple, image.height // multiple * multiple)
