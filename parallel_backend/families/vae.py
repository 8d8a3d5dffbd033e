"""What a VAE has to state: its latents, how it decodes and encodes, and what its file looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..mesh import Axis
from ..parallel.tensor import Model
from .latents import latent_problem


@dataclass(frozen=True)
class LatentShape:
    """What a latent is to pixels.

    Args:
        channels: of a latent.
        downscale: pixels to one latent position, along each side.
        frames: pictures to one latent frame, after a first one that is one picture; 0 for latents without frames.
    """

    channels: int
    downscale: int
    frames: int = 0

    @property
    def dims(self) -> int:
        """4 for latents ``[B, C, H, W]``, 5 for those with frames ``[B, C, F, H, W]``."""
        return 5 if self.frames else 4

    def pictures(self, latent_frames: int) -> int:
        """Pictures that so many latent frames make."""
        return 1 + self.frames * (latent_frames - 1)


class OutOfStepError(RuntimeError):
    """A rank has failed and is not where the others are: they wait for it in vain."""


class VaeRun(ABC):
    """A clip on its way through a VAE that all ranks work on together, piece by piece. Collective over them."""

    @abstractmethod
    def piece(self, x: Tensor) -> Tensor:
        """What the next frames become, whole: pictures of about -1..1, or a latent as the transformer sees it.

        A rank on which it raises has still taken part in whatever the ranks exchange meanwhile, unless it raises
        OutOfStepError.
        """


class VAE(ABC):
    """A VAE, which several families may name. Methods take configurations as files store them."""

    title: str
    """Of the models that it is known by, for messages."""
    class_name: str
    """diffusers' class."""
    imports: tuple[str, ...] = ()
    """Modules that it takes to build and run it, and that take seconds to import."""
    file_title: str
    """Names of its files, for messages."""
    over_ranks = False
    """Whether all ranks hold it and work on a picture together (`start`), or the first one alone."""

    @abstractmethod
    def latent_shape(self, config: Mapping[str, Any]) -> LatentShape:
        """What its latents are to pixels."""

    def build(self, config: Mapping[str, Any]) -> Model:
        """The VAE of a configuration, with weights on the meta device."""
        import diffusers  # here and in the families, what takes seconds to import is imported where it is used

        with torch.device("meta"):
            return getattr(diffusers, self.class_name).from_config(dict(config))

    def load(self, folder: Path, config: Mapping[str, Any]) -> Model:
        """The VAE of a component folder, whole, on the CPU, in fp32."""
        import diffusers

        kind = getattr(diffusers, self.class_name)
        return kind.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True, disable_mmap=True
        ).eval()

    def check_latent(self, config: Mapping[str, Any], shape: Sequence[int]) -> None:
        """Raise ValueError unless it can decode a latent of a shape: of any number of frames, where it has them."""
        latent = self.latent_shape(config)
        problem = latent_problem(shape, latent.channels, latent.dims, self.title)
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
        """About the features of a pixel of a piece that decoding holds at its peak."""

    def latent_pieces(self, frames: int) -> list[int]:
        """How many latent frames are decoded at a time."""
        return [frames]

    def image_pieces(self, frames: int) -> list[int]:
        """How many pictures are encoded at a time; those that are left over are of no use."""
        return [frames]

    # What one rank does alone:

    def decode(self, vae: Model, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` (``[B, 3, F, H, W]`` where latents have frames) in -1..1 from a latent.

        Latents are as the transformer sees them.
        """
        raise NotImplementedError

    def encode(self, vae: Model, image: Tensor) -> Tensor:
        """The way back."""
        raise NotImplementedError

    # What all ranks do together:

    def start(self, vae: Model, config: Mapping[str, Any], decodes: bool, axis: Axis, shape: Sequence[int]) -> VaeRun:
        """Begin with a clip.

        Args:
            vae, config: of this rank.
            decodes: whether latents become pictures, or pictures latents.
            axis: all ranks.
            shape: of the first piece.
        """
        raise NotImplementedError
