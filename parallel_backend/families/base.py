"""What a model family has to state: the interface that every file in this folder fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.block_cache import BlockStack
from ..config import ParallelismConfig, Speed
from ..parallel.tensor import Model, Shard

if TYPE_CHECKING:
    from ..parallel.attention import ShardedAttention
    from ..parallel.sequence import Entrance
    from .drawing import Drawing


@dataclass
class ModelAdapter:
    """The modules of one model that are to be parallelised, for callers who have no diffusers pipeline.

    Args:
        transformer: the diffusion transformer.
        text_encoder: its text encoder, if that is to be sharded too.
        scheduler: a diffusers scheduler, set to new timesteps for each picture: the cache tells pictures apart by it,
            and how many steps they have. Without one a picture ends where the timestep rises again.
    """

    transformer: Model
    text_encoder: Model | None = None
    scheduler: Any = None


@dataclass(frozen=True)
class Conditioning:
    """What an evaluation is conditioned on, as ComfyUI has it.

    Args:
        context: ``[B, L, C]`` from the text encoder.
        references: reference latents, ``[1 or B, C, ...]`` each.
        tensors: what else there is, on any device, by the names that the family gives in
            `Family.conditioning_tensors`, such as ``guidance [B]`` or the context's ``mask [B, L]`` (0: no token).
        options: choices, by the names that the family gives in `Family.conditioning_options`.
    """

    context: Tensor
    references: Sequence[Tensor] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VisionImage:
    """An image as a vision tower takes it: flattened patches ``[N, features]``, and how many in time, rows, columns."""

    patches: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class ReferenceModel:
    """The model of a family that people run, for what can be said before a checkpoint is there.

    Args:
        name: as people know it.
        transformer_config: of the transformer; what it leaves out has diffusers' defaults.
        text_config: of the text encoder, as its ``config.json`` has it.
        text_tokens: of a prompt.
        fp8_files: names of ComfyUI's fp8 files of transformer and text encoder.
        fp8_bytes: size of the transformer's, from which one sees how much of it stays in bf16.
    """

    name: str
    transformer_config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    text_tokens: int = 512
    fp8_files: tuple[str, ...] = ()
    fp8_bytes: int = 0


class Family(ABC):
    """Everything known about one model family. Methods take configurations as plain mappings, as files store them."""

    name: str
    """Short name in messages and file names."""
    title: str
    """The name people know."""
    models: tuple[str, ...]
    """Models that the family covers, by the names people know. What differs between them is read off checkpoints."""
    pipeline_classes: tuple[str, ...]
    """diffusers pipeline classes, as ``model_index.json`` spells them."""
    transformer_class: str
    """diffusers transformer class."""
    text_encoder_class: str
    """transformers class of the text encoder."""
    vae_class: str
    """diffusers class of the VAE."""
    sequence_inputs: tuple[tuple[str, ...], ...]
    """For each token stream the arguments of the transformer's forward that are cut along their second to last dim."""
    output_stream: int
    """Index of the stream that the transformer's output belongs to."""
    block_stacks: tuple[BlockStack, ...]
    """The transformer's lists of blocks in the order in which they run, for the cache."""
    latent_channels: int
    """Channels of the latent as ComfyUI and the transformer see it."""
    latent_dims: int = 4
    """4 for latents ``[B, C, H, W]``, 5 for those with frames ``[B, C, F, H, W]``, of which there is one."""
    latent_downscale: int
    """Pixels to one latent position, along each side."""
    pixel_multiple: int
    """Width and height of a picture are multiples of this."""
    imports: Mapping[str, tuple[str, ...]] = {}
    """Modules that a component of that name takes to be built and run, and that take seconds to import."""
    conditioning_tensors: tuple[str, ...] = ()
    """Names of the tensors beside the context that the transformer takes; see `Conditioning`."""
    conditioning_options: Mapping[str, tuple[str, ...]] = {}
    """Names of the choices that an evaluation takes, and their values."""
    reference_model: ReferenceModel

    # The transformer.

    @abstractmethod
    def build_transformer(self, config: Mapping[str, Any]) -> Model:
        """The transformer of a configuration, with weights on the meta device."""

    @abstractmethod
    def is_single_file(self, keys: Collection[str]) -> bool:
        """Whether keys of a file, without a prefix, are this family's transformer's as ComfyUI names them."""

    @abstractmethod
    def single_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The transformer's configuration, read off the shapes in a single file; ValueError if one is missing."""

    single_file_marks: tuple[str, ...] = ()
    """Keys of tensors that say something by being there, and are no weights."""

    @abstractmethod
    def single_file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        """What makes a parameter of the transformer: ``(key, part, parts)``, one after the other.

        Each is the part of that number of a tensor's rows, cut into so many equal parts.
        """

    @abstractmethod
    def check_layout(self, config: Mapping[str, Any], layout: ParallelismConfig) -> None:
        """Raise ValueError, naming degrees that would work, if the transformer cannot be split so."""

    @abstractmethod
    def transformer_plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
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
    def transformer_inputs(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """ComfyUI's arguments of a diffusion model as those of the diffusers transformer."""

    def check_latent(self, shape: Sequence[int], what: str = "latent") -> None:
        """Raise ValueError unless the transformer can take a latent (or a reference, as ``what`` says) of a shape."""
        if len(shape) != self.latent_dims:
            axes = "channels, frames, height, width" if self.latent_dims == 5 else "channels, height, width"
            kind = {3: " (audio)", 5: " (a video)"}.get(len(shape), "")
            problem = f"the shape {list(shape)}{kind}, {self.title} takes [batch, {axes}]"
        elif shape[1] != self.latent_channels:
            problem = f"{shape[1]} channels, {self.title} takes {self.latent_channels}"
        elif self.latent_dims == 5 and shape[2] != 1:
            problem = f"{shape[2]} frames (or layers), {self.title} takes one picture"
        elif not all(shape):
            problem = f"the shape {list(shape)}: there is nothing in it"
        else:
            return
        raise ValueError(f"the {what} has {problem}")

    def check_decodable(self, shape: Sequence[int]) -> None:
        """Raise ValueError unless the VAE can take a latent of a shape: of any number of frames, where it has them."""
        self.check_latent((*shape[:2], min(shape[2], 1), *shape[3:]) if len(shape) == 5 else shape)

    @abstractmethod
    def picture_tokens(self, arguments: Mapping[str, Any]) -> int:
        """How many image tokens of a forward of the transformer, with these arguments by name, are no reference's.

        They come first. The arguments may be a rank's, as they are behind the `Entrance`.
        """

    @abstractmethod
    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        """The diffusers transformer's output as the prediction that ComfyUI expects for latent ``x``."""

    def evaluate(self, transformer: Model, inputs: Mapping[str, Any], x: Tensor) -> Tensor:
        """The `prediction` of a transformer for its `transformer_inputs`.

        In inference mode, which spares the host a fifth of what it does for each operation, and more for collectives.
        """
        with torch.inference_mode():
            return self.prediction(transformer(**inputs, return_dict=False)[0], x)

    @abstractmethod
    def activation_width(self, config: Mapping[str, Any], tp: int) -> int:
        """About the features of a local token that a forward holds at its peak, on a rank of a tp degree."""

    # Drawing.

    @abstractmethod
    def drawing(self, pipeline_class: str) -> Drawing:
        """How one of the `pipeline_classes` draws a picture."""

    @abstractmethod
    def set_timesteps(self, scheduler: Any, steps: int, tokens: int) -> None:
        """Give a diffusers scheduler the steps that the family's pipeline would, for an image of ``tokens`` tokens."""

    # The text encoder.

    @abstractmethod
    def text_layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Which hidden states of the text encoder make the context."""

    @abstractmethod
    def text_plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        """How each weight of the text model is sharded; names are relative to the text model."""

    @abstractmethod
    def text_degree(self, config: Mapping[str, Any], ranks: int) -> int:
        """Over how many ranks (a divisor of ``ranks``) one copy of the text encoder can be sharded."""

    @abstractmethod
    def text_model(self, text_encoder: Model) -> Model:
        """The part of the text encoder that `text_plan` speaks of."""

    @abstractmethod
    def build_text_model(self, config: Mapping[str, Any]) -> Model:
        """A text model with just the layers that are used, with weights on the meta device."""

    @abstractmethod
    def localize_text(self, text_model: Model) -> None:
        """Tell a sharded text model's attention how many heads a rank holds."""

    has_vision_tower: bool = False
    """Whether the text encoder can look at images; if not, the next three raise ValueError."""

    def build_vision(self, config: Mapping[str, Any]) -> Model:
        """The vision tower of a text encoder's configuration, with weights on the meta device."""
        raise self._sees_nothing()

    def vision_keys(self, names: Sequence[str]) -> dict[str, str]:
        """From parameter names of the vision tower to the names in a checkpoint that has ``names``."""
        raise self._sees_nothing()

    def encode_images(self, vision: Model, images: Sequence[VisionImage]) -> Tensor:
        """What stands in the prompt for all images' placeholder tokens, one after the other: ``[N, hidden]``."""
        raise self._sees_nothing()

    @abstractmethod
    def text_keys(self, names: Sequence[str]) -> dict[str, str]:
        """From parameter names of the text model to the names in a checkpoint that has ``names``."""

    def _sees_nothing(self) -> ValueError:
        return ValueError(f"the text encoder of {self.title} does not look at images; give it a prompt alone")

    @abstractmethod
    def encode_text(
        self,
        text_model: Model,
        ids: Tensor,
        mask: Tensor,
        layers: Sequence[int],
        images: Tensor | None = None,
        grids: Sequence[tuple[int, int, int]] = (),
    ) -> Tensor:
        """Context ``[B, L, C]`` from token ids and mask ``[B, L]``.

        ``images [N, hidden]`` stand in the places of the placeholder tokens in ``ids``; the grids are their
        `VisionImage.grid`.
        """

    # The text encoder in a file of its own, as ComfyUI has it.

    text_file_title: str
    """What the file is called, for messages."""
    text_file_tokenizer: str | None
    """Key of the tokenizer in it; None where ComfyUI has the tokenizer itself."""

    @abstractmethod
    def is_text_file(self, keys: Collection[str]) -> bool:
        """Whether keys of a file are those of this family's text encoder."""

    @abstractmethod
    def text_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The text encoder's configuration, read off the shapes in its file; ValueError if one is missing."""

    # The VAE.

    def build_vae(self, config: Mapping[str, Any]) -> Model:
        """The VAE of a configuration, with weights on the meta device."""
        import diffusers  # here and in the families, what takes seconds to import is imported where it is used

        with torch.device("meta"):
            return getattr(diffusers, self.vae_class).from_config(dict(config))

    def load_vae(self, folder: Path) -> Model:
        """The VAE of a component folder, whole, on the CPU, in fp32."""
        import diffusers

        kind = getattr(diffusers, self.vae_class)
        return kind.from_pretrained(
            folder, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True, disable_mmap=True
        ).eval()

    def is_vae_file(self, keys: Collection[str]) -> bool:
        """Whether keys of a file are those of this family's VAE; False where such files are ComfyUI's alone."""
        return False

    def vae_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The VAE's configuration, read off the shapes in its file; ValueError if one is missing."""
        raise NotImplementedError

    def vae_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors under the names of the diffusers class."""
        raise NotImplementedError

    @abstractmethod
    def vae_width(self, config: Mapping[str, Any]) -> int:
        """About the features of a pixel that decoding holds at its peak."""

    @abstractmethod
    def decode_latent(self, vae: Model, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` (``[B, 3, F, H, W]`` where latents have frames) in -1..1 from a latent.

        Latents are as the transformer sees them.
        """

    @abstractmethod
    def encode_image(self, vae: Model, image: Tensor) -> Tensor:
        """The way back."""
