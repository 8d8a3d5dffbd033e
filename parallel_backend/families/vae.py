"""What a VAE has to state: its latents, how it decodes and encodes, and what its file looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..parallel.tensor import Model
from .latents import latent_problem


class VAE(ABC):
    """A VAE, which several families may name. Methods take configurations as files store them."""

    title: str
    """Of the models that it is known by, for messages."""
    class_name: str
    """diffusers' class."""
    imports: tuple[str, ...] = ()
    """Modules that it takes to build and run it, and that take seconds to import."""
    latent_channels: int
    latent_dims: int = 4
    """4 for latents ``[B, C, H, W]``, 5 for those with frames ``[B, C, F, H, W]``."""
    downscale: int
    """Pixels to one latent position, along each side."""

    def build(self, config: Mapping[str, Any]) -> Model:
        """The VAE of a configuration, with weights on the meta device."""
        import diffusers  # here and in the families, what takes seconds to import is imported where it is used

        with torch.device("meta"):
            return getattr(diffusers, self.class_name).from_config(dict(config))

    def load(self, folder: Path) -> Model:
        """The VAE of a component folder, whole, on the CPU, in fp32."""
        import diffusers

        kind = getattr(diffusers, self.class_name)
        return kind.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
        ).eval()

    def check_latent(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless it can decode a latent of a shape: of any number of frames, where it has them."""
        problem = latent_problem(shape, self.latent_channels, self.latent_dims, self.title)
        if problem:
            raise ValueError(f"the latent has {problem}")

    def is_file(self, keys: Collection[str]) -> bool:
        """Whether keys of a file are those of this family's VAE; False where such files are ComfyUI's alone."""
        return False

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The VAE's configuration, read off the shapes in its file; ValueError if one is missing."""
        raise NotImplementedError

    def tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the names of the diffusers class."""
        raise NotImplementedError

    @abstractmethod
    def width(self, config: Mapping[str, Any]) -> int:
        """About the features of a pixel that decoding holds at its peak."""

    @abstractmethod
    def decode(self, vae: Model, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` (``[B, 3, F, H, W]`` where latents have frames) in -1..1 from a latent.

        Latents are as the transformer sees them.
        """

    @abstractmethod
    def encode(self, vae: Model, image: Tensor) -> Tensor:
        """The way back."""
