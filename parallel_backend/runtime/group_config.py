"""What worker groups and the models in them are keyed by, and what can be checked before a process is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import AS_IT_IS, ParallelismConfig, Speed
from ..loading.checkpoint import open_checkpoint
from ..loading.weight_loader import FP8_MODES
from ..machine import missing_build_tools, missing_system
from ..planning.devices import Devices, TooManyRanksError, resolve_devices
from .host_address import ALONE, Hosts

DTYPES = ("auto", "bfloat16", "float16", "float32")
ENCODER_MEMORY = ("auto", "device", "host")
"""Where a text encoder stays between prompts; see `ModelConfig`."""


@dataclass(frozen=True)
class GroupConfig:
    """What a group of processes is keyed by: so many ranks, on those devices of each host.

    ``ranks`` are those on all ``hosts``; ``devices`` are the first host's.
    """

    devices: Devices
    ranks: int
    hosts: Hosts = ALONE

    def conflicts(self, other: GroupConfig) -> bool:
        """Whether two groups cannot be there at the same time: they share a GPU or an endpoint."""
        same_endpoint = self.hosts.several and self.hosts.endpoint == other.hosts.endpoint
        return same_endpoint or self.devices.overlaps(other.devices)


@dataclass(frozen=True)
class ModelConfig:
    """What a model in a group is keyed by: equal configurations share one. ``part`` is that of `open_checkpoint`.

    ``encoder_memory`` says where its text encoder stays between prompts: on its ``device``, in ``host`` memory, or
    (``auto``) on the device as long as a few GiB stay free there.
    """

    path: str
    layout: ParallelismConfig
    devices: Devices
    dtype: str
    fingerprint: str
    fp8: str = "cast"
    encoder_memory: str = "auto"
    hosts: Hosts = ALONE
    speed: Speed = AS_IT_IS
    part: str = ""

    @property
    def group(self) -> GroupConfig:
        """The group that the model is loaded into; models of other layouts of as many ranks share it."""
        return GroupConfig(self.devices, self.layout.world_size, self.hosts)

    @classmethod
    def create(
        cls,
        path: str | Path,
        layout: ParallelismConfig,
        devices: str = "auto",
        dtype: str = "auto",
        fp8: str = "cast",
        encoder_memory: str = "auto",
        hosts: Hosts = ALONE,
        speed: Speed = AS_IT_IS,
    ) -> ModelConfig:
        """Check everything that can be checked without starting a process.

        Args:
            path: a diffusers pipeline folder, or a model in one safetensors file; the same on all hosts.
            layout: degrees.
            devices: of this host, see `resolve_devices`.
            dtype: of the weights, one of `DTYPES`; ``auto`` is what suits the family on GPUs (`Transformer.dtype`; of a
                text encoder alone bfloat16) and float32 on the CPU.
            fp8: what becomes of weights that are stored in fp8, one of `FP8_MODES`; ``dtype`` is that of the others.
            encoder_memory: one of `ENCODER_MEMORY`.
            hosts: that the ranks are shared out among.
            speed: how the transformer's blocks run.

        Raises:
            ValueError: a checkpoint, layout, device, dtype or speed that cannot work, with the remedy.
        """
        if missing := missing_system():
            raise ValueError(missing)
        for what, value, known in (
            ("dtype", dtype, DTYPES),
            ("the use of fp8", fp8, FP8_MODES),
            ("the text encoder's memory", encoder_memory, ENCODER_MEMORY),
        ):
            if value not in known:
                raise ValueError(f"{what} {value!r} is not known; choose one of {', '.join(known)}")
        if speed.compile and (missing := missing_build_tools()):
            raise ValueError(f"compile needs {missing}, which this machine lacks; install it, or set compile to false")
        source = open_checkpoint(Path(path))
        source.check(layout)
        resolved = check_devices(devices, layout, hosts)
        if dtype == "auto":
            # A T5 leaves float16's range.
            on_gpu = source.family.transformer.dtype if "transformer" in source.components else "bfloat16"
            dtype = on_gpu if resolved.kind == "cuda" else "float32"
        return cls(str(source.path), layout, resolved, dtype, source.fingerprint(), fp8, encoder_memory, hosts, speed)


def check_devices(devices: str, layout: ParallelismConfig, hosts: Hosts) -> Devices:
    """The devices of this host for its share of a layout's ranks.

    Raises:
        ValueError: see `Hosts.ranks_each` and `resolve_devices`.
    """
    ranks = hosts.ranks_each(layout.world_size)
    try:
        return resolve_devices(devices, ranks)
    except ValueError as error:
        advice = share = ""
        if isinstance(error, TooManyRanksError):
            advice = f", such as {layout.shrunk(error.most * hosts.count).degrees()}"
        if hosts.several:
            share = f"; of {layout.world_size} ranks, each of {hosts.count} hosts has {ranks}"
        raise ValueError(f"{error}{advice}{share}") from None
