"""One module of a model as a rank holds it: loaded, moved and freed alone, and the same on all ranks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch

from ...config import ParallelismConfig, Speed
from ...families import Family, Model
from ...loading.checkpoint import Checkpoint
from ...loading.model_folders import model_name
from ...loading.safetensors_reader import Weight
from ...loading.weight_loader import load_weights, shard_bytes
from ...mesh import SINGLE, Axis, ParallelMesh, raise_together
from ...parallel.products import held_as, stored_tensors
from ...parallel.tensor import ParamShard
from .host_copy import HostCopies


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
        self.host: HostCopies | None = None
        self.away: set[int] = set()
        """Places among the stored tensors of those that this rank has lent the memory of: they are in host memory,
        while the component is on the devices. Each rank may have others."""
        self.formats: dict[str, int] = {}
        """Bytes of the weights as they were loaded, by what they are held as."""
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
        self.formats = held_as(module)

    def to_host(self) -> None:
        """Move the weights to host memory. The copy there is kept: weights do not change, so it is made once."""
        self._away(range(len(self._parameters())))
        self.away.clear()
        self.place = Place.HOST

    def to_device(self) -> None:
        """Bring the weights back from host memory: all of them, or what this rank has lent the memory of."""
        device, parameters = self.settings.device, self._parameters()
        whole = self.place is Place.HOST
        assert self.host is not None or not self.away
        copies = {} if self.host is None else self.host.tensors
        for place in range(len(parameters)) if whole else sorted(self.away):
            copy = copies[place]
            there = torch.empty_like(copy, device=device, pin_memory=False).copy_(copy, non_blocking=True)
            parameters[place].data = there
            self.away.discard(place)  # one by one: should the next find no memory, it is known which are there
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.place = Place.DEVICE

    def lend(self, size: int, host_room: int) -> int:
        """Free device memory of this rank alone, tensor by tensor from the last block on; `to_device` ends that.

        Args:
            size: bytes that are wanted.
            host_room: bytes that copies in host memory may take.

        Returns:
            Bytes of the tensors that moved: fewer than wanted where there are no more, or there is no room for them.
        """
        if self.place is not Place.DEVICE:
            return 0
        chosen, found = [], 0
        parameters = self._parameters()
        copied = set() if self.host is None else self.host.tensors.keys()
        for place in reversed(range(len(parameters))):
            nbytes = parameters[place].nbytes
            if found >= size:
                break
            if place in self.away or not nbytes:
                continue
            needed = 0 if place in copied else nbytes
            if needed <= host_room:
                host_room -= needed
                chosen.append(place)
                found += nbytes
        if chosen:
            self._away(chosen)
        return found

    def _away(self, places: Iterable[int]) -> None:
        """Have tensors be in host memory."""
        parameters = self._parameters()
        self.host = self.host or HostCopies()
        self.host.add({place: parameters[place] for place in places})
        for place in places:
            parameters[place].data = self.host.tensors[place]
            self.away.add(place)

    @property
    def lent_bytes(self) -> int:
        """Bytes of weights that this rank has to bring back before the component can be used where it is."""
        return 0 if self.host is None else sum(self.host.tensors[place].nbytes for place in self.away)

    @property
    def uncopied_bytes(self) -> int:
        """Bytes of host memory that moving all of it there would take now."""
        return self.nbytes - (0 if self.host is None else sum(copy.nbytes for copy in self.host.tensors.values()))

    def forget_workspace(self) -> None:
        """Give up memory beside the weights that is kept from one use to the next."""
        return

    def drop(self) -> None:
        """Free the weights; `load` reads them again."""
        self.module = self.host = self._built = None
        self.place = Place.FILE
        self.away.clear()
        gc.collect()  # modules, their hooks and caches refer to each other
        with contextlib.suppress(AttributeError, OSError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)  # or glibc keeps what was freed for itself

    def _parameters(self) -> list[torch.Tensor]:
        return [] if self.module is None else stored_tensors(self.module)
