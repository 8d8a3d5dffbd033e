"""How Qwen-Image's pipelines draw: templates, true CFG of a kept norm, images for vision tower and VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..conditioning import VisionImage
from ..drawing import Drawing, TextInputs, size_of_area
from .transformer import PATCH

MAX_TEXT_TOKENS = 512
"""Length that diffusers cuts a prompt to, beside the template; edit prompts are not cut."""
MEGAPIXEL = 1024 * 1024
REFERENCE_MULTIPLE = 32
"""Sides of resized reference images are multiples of this, pixels."""
IMAGE = "<|vision_start|>{}<|vision_end|>"
"""An image in a prompt, around its tokens."""
IMAGE_TOKEN = "<|image_pad|>"

_TEMPLATE = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)


class QwenImageDrawing(Drawing):
    """Qwen-Image: a prompt in a template, 50 steps, true CFG 4."""

    title = "Qwen-Image"
    cfg = 4.0
    options: Mapping[str, str] = {"positions": "diffusers"}
    template_tokens = 34
    """Of the template before the user's words, which the context goes without."""

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

        config = scheduler.config
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        scheduler.set_begin_index(0)

    def tokenize(self, tokenizer: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> TextInputs:
        # diffusers encodes up to 1024 tokens and cuts afterwards, which is the same: no token looks at later ones.
        tokens = tokenizer(
            [_TEMPLATE.format(_DESCRIBE, prompt)],
            max_length=MAX_TEXT_TOKENS + self.template_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return TextInputs(tokens["input_ids"], tokens["attention_mask"], drop=self.template_tokens)

    def combine(self, cond: Tensor, uncond: Tensor, cfg: float) -> Tensor:
        # Over the features of a token, which are the channels of 2 x 2 latent positions.
        combined = super().combine(cond, uncond, cfg)
        scale = _token_norm(cond) / _token_norm(combined).clamp_min(torch.finfo(torch.float32).tiny)
        return combined * scale.repeat_interleave(PATCH, dim=-2).repeat_interleave(PATCH, dim=-1)


class QwenImageEditDrawing(QwenImageDrawing):
    """Qwen-Image-Edit: one image of a megapixel, for the vision tower and as reference alike.

    The picture has its proportions if nothing else is asked for.
    """

    title = "Qwen-Image-Edit"
    least_images = most_images = 1
    widest = 100.0  # the processor takes 200, and sides are rounded before it
    needs_processor = True
    template_tokens = 64
    vision_area = reference_area = MEGAPIXEL
    """Pixels that an image is resized to, for the vision tower and for the VAE."""
    mention = "{1}"
    """How a prompt speaks of an image, from its number and its tokens."""

    def default_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        # The last: diffusers' Plus pipeline takes it, and there is but one without Plus.
        return size_of_area(MEGAPIXEL, images[-1], REFERENCE_MULTIPLE)

    def tokenize(self, tokenizer: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> TextInputs:
        seen = processor([_resize(image, self.vision_area) for image in images], return_tensors="pt")
        grids = [tuple(grid) for grid in seen["image_grid_thw"].tolist()]
        patches = seen["pixel_values"].split([prod(grid) for grid in grids])
        # transformers' own processor for text and images would do, but wants torchvision for its part about videos.
        mentions = [
            self.mention.format(number, IMAGE.format(IMAGE_TOKEN * (prod(grid) // processor.merge_size**2)))
            for number, grid in enumerate(grids, start=1)
        ]
        tokens = tokenizer([_TEMPLATE.format(_EDIT, "".join(mentions) + prompt)], return_tensors="pt")
        return TextInputs(
            tokens["input_ids"],
            tokens["attention_mask"],
            tuple(VisionImage(*pair) for pair in zip(patches, grids, strict=True)),
            self.template_tokens,
        )

    def reference_pixels(self, images: Sequence[Image.Image]) -> list[Tensor]:
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(vae_scale_factor=self.transformer.pixel_multiple)
        return [processor.preprocess(_resize(image, self.reference_area)).unsqueeze(2) for image in images]


class QwenImageEditPlusDrawing(QwenImageEditDrawing):
    """Qwen-Image-Edit-2509 and 2511: one to three images, which the vision tower sees smaller, and by number."""

    title = "Qwen-Image-Edit-Plus"
    most_images = 3
    vision_area = 384 * 384
    mention = "Picture {}: {}"


DRAWINGS: dict[str, type[QwenImageDrawing]] = {
    "QwenImagePipeline": QwenImageDrawing,
    "QwenImageEditPipeline": QwenImageEditDrawing,
    "QwenImageEditPlusPipeline": QwenImageEditPlusDrawing,
}
"""By the pipeline class."""


def _resize(image: Image.Image, area: int) -> Image.Image:
    return image.resize(size_of_area(area, image, REFERENCE_MULTIPLE), Image.Resampling.LANCZOS)


def _token_norm(latent: Tensor) -> Tensor:
    """``[B, C, F, H, W] -> [B, 1, F, H / 2, W / 2]``: the norm of each token's features."""
    squares = latent.float().square().sum(dim=1, keepdim=True)
    return squares.unflatten(-1, (-1, PATCH)).sum(-1).unflatten(-2, (-1, PATCH)).sum(-2).sqrt()
