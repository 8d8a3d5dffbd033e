"""The parts of a model as one rank holds them: transformer, text encoder, VAE, each loaded, moved and freed alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...cache.block_cache import BlockCache
from ...config import ParallelismConfig, Speed
from ...families import Family, Model, VisionImage
from ...loading.adapters import NO_ADAPTERS, AdapterSet
from ...loading.checkpoint import Checkpoint
from ...loading.model_folders import model_name
from ...loading.pipeline_folder import PipelineFolder
from ...loading.safetensors_reader import Weight
from ...loading.text_encoder_file import TextEncoderFile
from ...loading.vae_file import VaeFile
from ...loading.weight_loader import load_weights, shard_bytes
from ...mesh import SINGLE, Axis, ParallelMesh, raise_together
from ...parallel.tensor import ParamShard
from ...parallelize import forget_graphs, parallelize_transformer, shard_text_model, text_axes
from ...planning.memory import transformer_activation_bytes, vae_activation_bytes
from .adapted_weights import AdaptedWeights
from .host_copy import HostCopy


class Place(Enum):
    """Where a part's weights are. The same on all ranks: parts move together."""

    DEVICE = "device"
    HOST = "host"
    FILE = "file"


@dataclass(frozen=True)
class ModelSettings:
    """What the parts of one model have in common."""

    source: Checkpoint
    layout: ParallelismConfig
    mesh: ParallelMesh
    device: torch.device
    dtype: torch.dtype
    fp8: str
    speed: Speed

    @property
    def family(self) -> Family:
        return self.source.family


class Component(ABC):
    """One module of a model. It is built at once, on the meta device; `load` gives it its weights.

    Args:
        settings: of the model.
    """

    name: str
    replicas: Axis = SINGLE
    """Ranks that hold the same slices, which share the reading."""
    on_demand = False
    """Whether it is loaded when it is first used, not with the model."""

    def __init__(self, settings: ModelSettings) -> None:
        self.settings = settings
        self.place = Place.FILE
        self.module: Model = None
        self.host: HostCopy | None = None
        self._built: tuple[Model, Mapping[str, ParamShard]] | None = self.build()
        self.nbytes = self._count(*self._built)
        """Bytes of this rank's weights, wherever they are."""

    @cached_property
    def _weights(self) -> dict[str, Weight]:
        """What each parameter is made of; a folder reads its files' headers for it."""
        return self.settings.source.weights(self.name)

    def _count(self, module: Model, table: Mapping[str, ParamShard]) -> int:
        """Bytes that the weights of a built module will take."""
        return shard_bytes(module, self._weights, table, self.settings.dtype, self.settings.fp8)

    @abstractmethod
    def workspace(self, size: int) -> int:
        """About the bytes that this rank needs beside the weights for work of a size."""

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.name.replace('_', ' ')} of {model_name(self.settings.source.path)}"

    @abstractmethod
    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        """The rank-local module on the meta device, and the slices that it is made of."""

    def load(self, on_bytes: Callable[[int], None]) -> None:
        """Read the weights onto the device. Collective over all ranks of the model.

        Raises:
            ValueError: the checkpoint is damaged; on every rank the same, and the part is not there.
            Exception: something else; on every rank one, unless replicas were waiting for each other.
        """
        settings = self.settings
        module, table = self._built or self.build()
        self._built = None
        error: Exception | None = None
        try:
            self.nbytes = load_weights(
                module, self._weights, table,
                device=settings.device, dtype=settings.dtype, replicas=self.replicas,
                fp8=settings.fp8, on_bytes=on_bytes,
            )  # fmt: skip
        except ValueError as found:
            error = found
        except Exception as found:
            if self.replicas.is_split:  # the other replicas are waiting for what this one reads
                raise
            error = found
        raise_together(error, settings.mesh.world)
        module.to(settings.device)  # buffers
        self.module, self.place = module, Place.DEVICE

    def to_host(self) -> None:
        """Move the weights to host memory. The copy there is kept: weights do not change, so it is made once."""
        parameters = self._parameters()
        if self.host is None:
            self.host = HostCopy(parameters)
        for parameter, copy in zip(parameters, self.host.tensors, strict=True):
            parameter.data = copy
        self.place = Place.HOST

    def to_device(self) -> None:
        """Bring the weights back from host memory."""
        assert self.host is not None
        device = self.settings.device
        for parameter, copy in zip(self._parameters(), self.host.tensors, strict=True):
            parameter.data = torch.empty_like(copy, device=device, pin_memory=False).copy_(copy, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.place = Place.DEVICE

    def drop(self) -> None:
        """Free the weights; `load` reads them again."""
        self.module = self.host = self._built = None
        self.place = Place.FILE
        gc.collect()  # modules, their hooks and caches refer to each other
        with contextlib.suppress(AttributeError, OSError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)  # or glibc keeps what was freed for itself

    def _parameters(self) -> list[Any]:
        return [] if self.module is None else list(self.module.parameters())


class TransformerComponent(Component):
    """The transformer: sharded over tp, the same on all ranks of cp."""

    name = "transformer"
    adapters = NO_ADAPTERS
    """What the weights are changed by."""
    merged: frozenset[str] = frozenset()
    """Parameters that are not as the file has them."""
    beside = 0
    """Bytes that stand beside weights in 8 bits; they count among `nbytes`."""

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        settings = self.settings
        assert not isinstance(settings.source, TextEncoderFile | VaeFile)
        self.config, self.replicas = settings.source.transformer_config, settings.mesh.cp
        kind = settings.family.transformer
        module = kind.build(self.config)
        table = parallelize_transformer(module, kind, settings.layout, settings.mesh, settings.speed)
        self.table = table
        self.cache = BlockCache(module, kind.block_stacks, settings.mesh.world, kind.picture_tokens)
        return module, table

    def to_host(self) -> None:
        forget_graphs(self.module)  # which know where the weights were
        for run in self.cache.runs():
            self.cache.forget(run)
        super().to_host()

    def drop(self) -> None:
        self.__dict__.pop("cache", None)  # it holds the module; the next build makes another
        super().drop()

    def load(self, on_bytes: Callable[[int], None]) -> None:
        super().load(on_bytes)
        adapters, self.adapters, self.merged = self.adapters, NO_ADAPTERS, frozenset()
        self.beside = 0
        self.adapt(adapters)

    def adapt(self, adapters: AdapterSet, make_room: Callable[[int], object] = lambda size: None) -> None:
        """Have the weights be those of the file with a set of patches, and with no others. Collective.

        Plain weights are patched in place, and read again from the file before other patches; beside those that stay in
        8 bits stands a product of two thin matrices. The weights stay where they are, so compiled code and CUDA graphs
        stay valid.

        Args:
            adapters: the set.
            make_room: for so many bytes beside the weights; collective.

        Raises:
            ValueError: a patch that these weights cannot have, before anything is changed; or the file cannot be read
                again, and which weights there are is not known until a set is applied.
        """
        if adapters.name == self.adapters.name:
            return
        settings = self.settings
        weights = AdaptedWeights(self.module, settings.family.transformer, self.table, settings.dtype)
        error: Exception | None = None
        try:
            weights.check(adapters)
        except ValueError as found:
            error = found
        raise_together(error, settings.mesh.world)
        beside = weights.beside_bytes(adapters)
        make_room(beside)
        again, now = self.merged, weights.merged(adapters)
        self.merged, self.adapters = again | now, AdapterSet("unknown")
        self.host = None  # has other weights
        try:
            if again:
                load_weights(
                    self.module, self._weights, self.table, device=settings.device, dtype=settings.dtype,
                    replicas=self.replicas, fp8=settings.fp8, again=again,
                )  # fmt: skip
            weights.apply(adapters)
        except ValueError as found:
            error = found
        raise_together(error, settings.mesh.world)
        self.merged, self.adapters = now, adapters
        self.nbytes, self.beside = self.nbytes + beside - self.beside, beside
        forget_graphs(self.module)  # those of linears that had nothing beside them before

    def workspace(self, tokens: int) -> int:
        """About the bytes that an evaluation over so many tokens (of the batch, in full) takes beside the weights."""
        settings = self.settings
        return transformer_activation_bytes(
            settings.family, self.config, settings.layout, tokens, settings.dtype.itemsize
        )

    def residual_bytes(self, tokens: int, order: int) -> int:
        """At most the bytes that this rank's cache needs for a conditioning of so many tokens, with TaylorSeer's order.

        The first blocks' residual, the derivatives, and the new ones while the old are still there.
        """
        width = self.settings.family.transformer.width(self.config)
        local = -(-tokens // self.settings.layout.cp_size)
        return (1 + 2 * (order + 1)) * local * width * self.settings.dtype.itemsize


class TextEncoderComponent(Component):
    """The text encoder: sharded over all ranks, or over as many as its heads divide by."""

    name = "text_encoder"

    def __init__(self, settings: ModelSettings) -> None:
        assert isinstance(settings.source, PipelineFolder | TextEncoderFile)
        self.config = settings.source.text_config
        self.kind = settings.family.needs_text_encoder()
        self.layers = self.kind.layers(self.config)
        self._axis, self.replicas = text_axes(self.kind, self.config, settings.mesh)
        super().__init__(settings)
        assert self._built is not None
        built = self._built[0].config
        # The hidden states of all layers are kept until the ones that are used are picked; a layer has a few more.
        self._width = (built.num_hidden_layers + 8) * built.hidden_size

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        module = self.kind.build(self.config)
        return module, shard_text_model(module, self.kind, self.config, self._axis)

    def encode(self, ids: Tensor, mask: Tensor, images: Tensor | None, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Context ``[B, L, C]``, as `TextEncoder.encode` makes it."""
        device = self.settings.device
        return self.kind.encode(self.module, ids.to(device), mask.to(device), self.layers, images, grids)

    def workspace(self, tokens: int) -> int:
        """About the bytes that encoding so many tokens takes beside the weights."""
        return tokens * self._width * self.settings.dtype.itemsize


class VisionComponent(Component):
    """A text encoder's vision tower: whole on rank 0, which tells the other ranks what it saw."""

    name = "vision_tower"
    on_demand = True

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        source, family = self.settings.source, self.settings.family
        assert isinstance(source, PipelineFolder | TextEncoderFile)
        if self.settings.mesh.world.rank:
            return torch.nn.Module(), {}
        return family.needs_text_encoder().build_vision(source.text_config), {}

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


class VAEComponent(Component):
    """The VAE: whole on rank 0, in fp32; the other ranks have nothing of it."""

    name = "vae"

    @property
    def _here(self) -> bool:
        return self.settings.mesh.world.rank == 0

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        if not self._here:
            return torch.nn.Module(), {}
        assert isinstance(self.settings.source, PipelineFolder | VaeFile)
        module = self.settings.family.needs_vae().build(self.settings.source.vae_config)
        self._config = dict(module.config)
        return module, {}

    def _count(self, module: Model, table: Mapping[str, ParamShard]) -> int:
        return sum(p.numel() for p in module.parameters()) * torch.float32.itemsize

    def load(self, on_bytes: Callable[[int], None]) -> None:
        settings = self.settings
        self._built = None
        error: Exception | None = None
        if self._here:
            source = settings.source
            place = source.path if isinstance(source, VaeFile) else source.path / self.name
            try:
                vae = source.load() if isinstance(source, VaeFile) else settings.family.needs_vae().load(place)
                self.module = vae.to(settings.device)
                for name, tensor in self.module.state_dict().items():
                    if not tensor.isfinite().all():
                        raise ValueError(f"{name} holds values that are not finite numbers; download it again")
            except (OSError, ValueError) as found:
                self.module = None
                error = ValueError(f"the VAE in {place} cannot be loaded: {found}")
            except Exception as found:  # such as too little memory
                self.module, error = None, found
        raise_together(error, settings.mesh.world)
        on_bytes(self.nbytes)
        self.place = Place.DEVICE

    def decode(self, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` in -1..1 from a latent; on rank 0."""
        return self.settings.family.needs_vae().decode(self.module, latent.to(self.settings.device, torch.float32))

    def encode(self, image: Tensor) -> Tensor:
        """Latent ``[B, C, h, w]`` from an image ``[B, 3, H, W]`` in -1..1; on rank 0."""
        return self.settings.family.needs_vae().encode(self.module, image.to(self.settings.device, torch.float32))

    def workspace(self, pixels: int) -> int:
        """About the bytes that so many pixels take beside the weights; on rank 0."""
        if not self._here:
            return 0
        return vae_activation_bytes(self.settings.family, self._config, pixels)


COMPONENTS: dict[str, type[Component]] = {
    part.name: part for part in (TransformerComponent, TextEncoderComponent, VisionComponent, VAEComponent)
}
