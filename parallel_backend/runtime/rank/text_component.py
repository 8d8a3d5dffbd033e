"""The text encoder of a model as one rank holds it, and the vision tower of one that reads images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ...families import Model, VisionImage
from ...loading.pipeline_folder import PipelineFolder
from ...loading.text_encoder_file import TextEncoderFile
from ...mesh import raise_together
from ...parallel.tensor import ParamShard
from ...parallelize import shard_text_model, text_axes
from .adaptable_component import AdaptableComponent
from .component import ModelSettings


class TextEncoderComponent(AdaptableComponent):
    """The text encoder: sharded over all ranks, or over as many as its heads divide by."""

    name = "text_encoder"

    def __init__(self, settings: ModelSettings) -> None:
        assert isinstance(settings.source, PipelineFolder | TextEncoderFile)
        self.config = settings.source.text_config
        self.kind = settings.family.needs_text_encoder()
        self.layers = self.kind.layers(self.config)
        self.shards, self.replicas = text_axes(self.kind, self.config, settings.mesh)
        super().__init__(settings)
        assert self._built is not None
        built = self._built[0].config
        # The hidden states of all layers are kept until the ones that are used are picked; a layer has a few more.
        self._width = (built.num_hidden_layers + 8) * built.hidden_size

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        module = self.kind.build(self.config)
        self.table = shard_text_model(module, self.kind, self.config, self.shards)
        return module, self.table

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return ((self.kind.patch_name(name), 0, 1),)

    def encode(self, ids: Tensor, mask: Tensor, images: Tensor | None, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Context ``[B, L, C]``, as `TextEncoder.encode` makes it."""
        device = self.settings.device
        return self.kind.encode(self.module, ids.to(device), mask.to(device), self.layers, images, grids)

    def workspace(self, tokens: int) -> int:
        """About the bytes that encoding so many tokens takes beside the weights."""
        return tokens * self._width * self.settings.dtype.itemsize


class VisionComponent(AdaptableComponent):
    """A text encoder's vision tower: whole on rank 0, which tells the other ranks what it saw."""

    name = "vision_tower"
    on_demand = True

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        source, family = self.settings.source, self.settings.family
        assert isinstance(source, PipelineFolder | TextEncoderFile)
        self.table: Mapping[str, ParamShard] = {}
        if self.settings.mesh.world.rank:
            return torch.nn.Module(), {}
        return family.needs_text_encoder().build_vision(source.text_config), {}

    def file_rows(self, name: str) -> tuple[tuple[str, int, int], ...]:
        return ((f"visual.{name}", 0, 1),)

    def encode(self, images: Sequence[VisionImage]) -> Tensor:
        """What stands in the prompt for the images' placeholder tokens, ``[N, hidden]``; on every rank the same."""
        settings, world = self.settings, self.settings.mesh.world
        features = torch.empty(0)
        shape = torch.zeros(2, dtype=torch.int64, device=settings.device)
        error: Exception | None = None
        if world.rank == 0:
            try:
                moved = [VisionImage(image.patches.to(settings.device), image.grid) for image in images]
                features = settings.family.needs_text_encoder().encode_images(self.module, moved)
                shape = torch.tensor(features.shape, device=settings.device)
            except Exception as found:
                error = found
        raise_together(error, world)
        if world.is_split:
            first = dist.get_global_rank(world.group, 0) if world.group is not None else 0
            dist.broadcast(shape, first, group=world.group)
            if world.rank:
                features = torch.empty(tuple(shape.tolist()), dtype=settings.dtype, device=settings.device)
            dist.broadcast(features.contiguous(), first, group=world.group)
        return features

    def workspace(self, patches: int) -> int:
        """About the bytes that so many patches take beside the weights; on rank 0."""
        if self.settings.mesh.world.rank:
            return 0
        vision = self.settings.source.text_config["vision_config"]  # type: ignore[union-attr]
        return patches * 12 * vision["hidden_size"] * self.settings.dtype.itemsize
