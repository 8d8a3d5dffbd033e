"""What a diffusion transformer has to state: its shapes, how it is sharded, and what a call by ComfyUI is to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..cache.block_cache import BlockStack
from ..config import ParallelismConfig, Speed
from ..parallel.tensor import Model, Shard
from .conditioning import Conditioning
from .latents import latent_problem

if TYPE_CHECKING:
    from ..parallel.attention import ShardedAttention
    from ..parallel.sequence import Entrance


class LatentLook(NamedTuple):
    """What latents look like: channels, pixels to a position along each side, and to a token."""

    channels: int
    downscale: int
    multiple: int


class Transformer(ABC):
    """A diffusion transformer. Methods take configurations as plain mappings, as files store them."""

    title: str
    """The name people know, for messages."""
    class_name: str
    """diffusers' class."""
    sequence_inputs: tuple[tuple[str, ...], ...]
    """For each token stream the arguments of the model's forward that are cut along their second to last dim; none
    where its `Entrance` cuts and gathers by itself."""
    output_stream: int
    """Index of the stream that the model's output belongs to."""
    block_stacks: tuple[BlockStack, ...]
    """The lists of blocks in the order in which they run, for the cache."""
    latent_channels: int
    """Channels of the latent as ComfyUI and the model see it."""
    latent_dims: int = 4
    """4 for latents ``[B, C, H, W]``, 5 for those with frames ``[B, C, F, H, W]``."""
    latent_downscale: int
    """Pixels to one latent position, along each side."""
    frame_downscale: int = 0
    """Frames of pixels to one of the latent, after the first of each; 0 where it takes one picture."""
    pixel_multiple: int
    """Width and height of a picture are multiples of this."""
    timestep_scale: float = 1.0
    """The timestep of pure noise."""
    dtype: str = "bfloat16"
    """What ComfyUI computes in on NVIDIA's GPUs, and so what workers do on GPUs unless something else is chosen."""
    imports: tuple[str, ...] = ()
    """Modules that it takes to build and run it, and that take seconds to import."""
    conditioning_tensors: tuple[str, ...] = ()
    """Names of the tensors beside the context that it takes; see `Conditioning`."""
    conditioning_options: Mapping[str, tuple[str, ...]] = {}
    """Names of the choices that an evaluation takes, and their values."""

    @abstractmethod
    def build(self, config: Mapping[str, Any]) -> Model:
        """The transformer of a configuration, with weights on the meta device."""

    @abstractmethod
    def is_file(self, keys: Collection[str]) -> bool:
        """Whether keys of a file, without a prefix, are this family's transformer's as ComfyUI names them."""

    @abstractmethod
    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The transformer's configuration, read off the shapes in a single file; ValueError if one is missing."""

    file_marks: tuple[str, ...] = ()
    """Keys of tensors that say something by being there, and are no weights."""

    @abstractmethod
    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        """What makes a parameter of the transformer: ``(key, part, parts)``, one after the other.

        Each is the part of that number of a tensor's rows, cut into so many equal parts.
        """

    def check_metadata(self, metadata: Mapping[str, str]) -> None:  # noqa: B027
        """Raise ValueError for a file that says of itself that it is a model with the same tensors, but another."""

    @abstractmethod
    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        """Raise ValueError, naming degrees that would work, if the transformer cannot be split so."""

    @abstractmethod
    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        """How each weight of the transformer is sharded over tp; what is not named is replicated."""

    @abstractmethod
    def install(self, transformer: Model, attention: ShardedAttention, speed: Speed) -> Entrance:
        """Give the transformer's blocks forwards that compute over the sharded sequence.

        Args:
            transformer: the model; its blocks change on this instance only.
            attention: over the sequence.
            speed: how the blocks run.

        Returns:
            What the model does with its inputs around the cut, and how all of it is undone.
        """

    @abstractmethod
    def inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """ComfyUI's arguments of a diffusion model as those of the diffusers transformer.

        Timesteps are ``[B]``, or ``[B, F]`` of frames where there are some.
        """

    def latent_look(self, config: Mapping[str, Any]) -> LatentLook:
        """What latents of a transformer of a configuration look like; of most families all are alike."""
        return LatentLook(self.latent_channels, self.latent_downscale, self.pixel_multiple)

    def check_latent(self, shape: Sequence[int], config: Mapping[str, Any], what: str = "latent") -> None:
        """Raise ValueError unless the model can take a latent (or a reference, as ``what`` says) of a shape."""
        problem = latent_problem(shape, self.latent_look(config).channels, self.latent_dims, self.title)
        if not problem and self.latent_dims == 5 and not self.frame_downscale and shape[2] != 1:
            problem = f"{shape[2]} frames (or layers), {self.title} takes one picture"
        if problem:
            raise ValueError(f"the {what} has {problem}")

    @abstractmethod
    def picture_tokens(self, arguments: Mapping[str, Any]) -> int:
        """How many image tokens of a forward of the transformer, with these arguments by name, are no reference's.

        They come first. The arguments may be a rank's, as they are behind the `Entrance`.
        """

    @abstractmethod
    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        """The diffusers transformer's output as the prediction that ComfyUI expects for latent ``x``."""

    def tokens(self, inputs: Mapping[str, Any]) -> int:
        """Tokens of all streams and samples of a forward with these `inputs`."""
        return sum(inputs[stream[0]].shape[:2].numel() for stream in self.sequence_inputs)

    def evaluate(self, transformer: Model, inputs: Mapping[str, Any], x: Tensor) -> Tensor:
        """The `prediction` of a transformer for its `inputs`.

        In inference mode, which spares the host a fifth of what it does for each operation, and more for collectives.
        """
        with torch.inference_mode():
            return self.prediction(transformer(**inputs, return_dict=False)[0], x)

    @abstractmethod
    def heads(self, config: Mapping[str, Any]) -> int:
        """How many attention heads it has."""

    @abstractmethod
    def width(self, config: Mapping[str, Any]) -> int:
        """The features of a token between its blocks."""

    @abstractmethod
    def context_width(self, config: Mapping[str, Any]) -> int:
        """The features of a token of the context."""

    @abstractmethod
    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        """About the features of a local token that a forward holds at its peak, on a rank of a tp degree."""

    def latent_shape(
        self, config: Mapping[str, Any], width: int, height: int, frames: int = 1, batch: int = 1
    ) -> tuple[int, ...]:
        """Shape of the latent of a picture, or of so many frames, of a width and height in pixels."""
        look = self.latent_look(config)
        count = (frames - 1) // self.frame_downscale + 1 if self.frame_downscale else 1
        sides = height // look.downscale, width // look.downscale
        return batch, look.channels, *((count,) if self.latent_dims == 5 else ()), *sides

    def latent_tokens(self, config: Mapping[str, Any], width: int, height: int, frames: int = 1) -> int:
        """Tokens of such a latent."""
        multiple = self.latent_look(config).multiple
        count = (frames - 1) // self.frame_downscale + 1 if self.frame_downscale else 1
        return count * (height // multiple) * (width // multiple)

    def concat_channels(self, config: Mapping[str, Any]) -> int:
        """Channels that ComfyUI puts behind the latent's, and `Conditioning` has as its tensor ``concat``."""
        return 0

    def example_tensors(self, config: Mapping[str, Any], latent: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of `Conditioning` that it cannot do without, for a latent of a shape."""
        return {}

    def kept_bytes(self, config: Mapping[str, Any], tp: int, itemsize: int) -> int:
        """At most the bytes that a rank of a tp degree keeps of conditionings, beside what a forward holds."""
        return 0
