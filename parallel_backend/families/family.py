"""A model family: a transformer, and as much of what stands around it as the workers can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .drawing import Drawing
from .text_encoder import TextEncoder
from .transformer import Transformer
from .vae import VAE


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
        transformers: of its size that take turns in a run, such as Wan 2.2's two experts.
        width, height, frames: of the picture or video that layouts are judged by, in pixels.
    """

    name: str
    transformer_config: Mapping[str, Any]
    text_config: Mapping[str, Any] = field(default_factory=dict)
    text_tokens: int = 512
    fp8_files: tuple[str, ...] = ()
    fp8_bytes: int = 0
    transformers: int = 1
    width: int = 1024
    height: int = 1024
    frames: int = 1

    @property
    def sample(self) -> str:
        """That picture or video, for people."""
        return f"{self.width} x {self.height}" + (f" x {self.frames} frames" if self.frames > 1 else "")


@dataclass(frozen=True, eq=False)
class Family:
    """A composition: only the transformer is required.

    With a transformer alone, its single files are loaded, and text encoder and VAE stay ComfyUI's own.

    Args:
        name: short name in messages and file names.
        models: that the family covers, by the names people know. What differs between them is read off checkpoints.
        transformer: of all of them.
        reference_model: the one that is counted where there is no checkpoint.
        text_encoder, vae: None: the workers do not hold any.
        drawings: by diffusers' pipeline classes, how each draws a picture. They take a text encoder and a VAE.
        transformer_alone: of its models, those that run with another text encoder, which is ComfyUI's own.
        pipelines_of_others: further pipeline classes with this transformer, whose folders are not read.
    """

    name: str
    models: tuple[str, ...]
    transformer: Transformer
    reference_model: ReferenceModel
    text_encoder: TextEncoder | None = None
    vae: VAE | None = None
    drawings: Mapping[str, type[Drawing]] = field(default_factory=dict)
    transformer_alone: tuple[str, ...] = ()
    pipelines_of_others: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name people know."""
        return self.transformer.title

    @property
    def pipeline_classes(self) -> tuple[str, ...]:
        """diffusers' pipeline classes whose folders are read, as ``model_index.json`` spells them."""
        return tuple(self.drawings)

    def drawing(self, pipeline_class: str) -> Drawing:
        """How one of the `pipeline_classes` draws a picture."""
        return self.drawings[pipeline_class](self.transformer)

    def needs_text_encoder(self) -> TextEncoder:
        """The text encoder; ValueError where the workers hold none."""
        if self.text_encoder is None:
            raise ValueError(self._lacks("text encoder", "CLIP"))
        return self.text_encoder

    def needs_vae(self) -> VAE:
        """The VAE; ValueError where the workers hold none."""
        if self.vae is None:
            raise ValueError(self._lacks("VAE", "VAE"))
        return self.vae

    def imports(self, component: str) -> tuple[str, ...]:
        """Modules that whoever builds and runs a component is going to import."""
        found = {"transformer": self.transformer, "text_encoder": self.text_encoder, "vae": self.vae}.get(component)
        return () if found is None else found.imports

    def _lacks(self, what: str, node: str) -> str:
        return (
            f"of {self.title} the workers hold the transformer, and no {what}: load the transformer's file with Load "
            f"Diffusion Model (Parallel), and the {what} with ComfyUI's own Load {node}"
        )
