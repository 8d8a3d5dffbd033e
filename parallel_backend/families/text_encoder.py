"""What a text encoder has to state: which layers make the context, how it is sharded, what its file looks like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..parallel.tensor import Model, Shard
from .conditioning import VisionImage


class TextEncoder(ABC):
    """A text encoder, which several families may name. Methods take configurations as files store them."""

    title: str
    """The name people know, for messages."""
    class_name: str
    """transformers' class."""
    imports: tuple[str, ...] = ()
    """Modules that it takes to build and run it, and that take seconds to import."""

    @abstractmethod
    def layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Which hidden states of the text encoder make the context."""

    @abstractmethod
    def plan(self, config: Mapping[str, Any]) -> dict[str, Shard]:
        """How each weight of the text model is sharded; names are relative to the text model."""

    @abstractmethod
    def degree(self, config: Mapping[str, Any], ranks: int) -> int:
        """Over how many ranks (a divisor of ``ranks``) one copy of the text encoder can be sharded."""

    @abstractmethod
    def text_model(self, text_encoder: Model) -> Model:
        """The part of the text encoder that `plan` speaks of."""

    @abstractmethod
    def build(self, config: Mapping[str, Any]) -> Model:
        """A text model with just the layers that are used, with weights on the meta device."""

    @abstractmethod
    def localize(self, text_model: Model) -> None:
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
    def keys(self, names: Sequence[str]) -> dict[str, str]:
        """From parameter names of the text model to the names in a checkpoint that has ``names``."""

    def patch_name(self, name: str) -> str:
        """What patches (LoRA) call a parameter of the text model."""
        return f"model.{name}"

    def _sees_nothing(self) -> ValueError:
        return ValueError(f"the text encoder {self.title} does not look at images; give it a prompt alone")

    @abstractmethod
    def encode(
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

    file_title: str
    """What the file is called, for messages."""
    file_tokenizer: str | None
    """Key of the tokenizer in it; None where ComfyUI has the tokenizer itself."""

    @abstractmethod
    def is_file(self, keys: Collection[str]) -> bool:
        """Whether keys of a file are those of this family's text encoder."""

    @abstractmethod
    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The text encoder's configuration, read off the shapes in its file; ValueError if one is missing."""
