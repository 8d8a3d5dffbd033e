"""From degrees to process groups: the device mesh with axes ("ring", "ulysses", "tp") and what a rank is in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .config import ParallelismConfig


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it: its process group, its degree and this rank's place in it."""

    group: dist.ProcessGroup | None
    degree: int
    rank: int
    copies: bool = False
    """Whether blocks exchange by the GPUs' copy engines, which all of its ranks can (`parallel.copies`)."""
    name: str = field(init=False, repr=False)
    """The group's name, by which functional collectives know it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "" if self.group is None else self.group.group_name)

    @property
    def is_split(self) -> bool:
        return self.degree > 1


def all_gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The tensors ``[...]`` of every rank of an axis, in rank order: ``[degree, ...]``."""
    gathered = x.new_empty(axis.degree, *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=axis.group)
    return gathered


SINGLE = Axis(group=None, degree=1, rank=0)


@functools.lru_cache(1)
def _groups_beside(world: dist.ProcessGroup) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """What `_group_of` has made beside this default group, by their ranks."""
    return {tuple(range(world.size())): world}


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The process group of some ranks in rising order. Collective over the default group where it is new.

    Each costs threads, descriptors and, with NCCL, memory of the GPU, and so is made once and kept for whatever layout
    or model asks for it next.
    """
    assert dist.group.WORLD is not None
    groups = _groups_beside(dist.group.WORLD)
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks))
    return groups[ranks]


def groups_in_use() -> list[dist.ProcessGroup]:
    """Every process group that axes of this rank have been given, the default one included; none without it."""
    if not dist.is_initialized():
        return []
    assert dist.group.WORLD is not None
    rank = dist.get_rank()
    return [group for ranks, group in _groups_beside(dist.group.WORLD).items() if rank in ranks]


def axis_among(lines: torch.Tensor, copies: bool = False) -> Axis:
    """The axis of this rank's line. Collective over the default group.

    Args:
        lines: ``[lines, degree]``, global ranks in rising order, each on one line at most.
        copies: see `Axis`.

    Returns:
        `SINGLE` for a rank that is on none.
    """
    axis = SINGLE
    for ranks in map(tuple, lines.tolist() if lines.shape[1] > 1 else ()):
        group = _group_of(ranks)
        if dist.get_rank() in ranks:
            axis = Axis(group, len(ranks), ranks.index(dist.get_rank()), copies)
    return axis


ERROR_BYTES = 4000
"""Of an error's text that `raise_together` carries."""


class AnotherRankError(RuntimeError):
    """What is raised on a rank for the failure of another one, whose name its text has."""


def raise_together(error: Exception | None, axis: Axis) -> None:
    """Raise on every rank of an axis what one of them found; else the others would go on and wait for it. Collective.

    Args:
        error: this rank's, or None.
        axis: the ranks. One that has an error raises it; the others raise that of the first one that has one, as a
            ValueError where it is one, else as an AnotherRankError.
    """
    if not axis.is_split:
        if error is not None:
            raise error
        return
    device = default_device_type()
    first = torch.tensor(axis.degree if error is None else axis.rank, device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=axis.group)
    if first == axis.degree:
        return
    text = torch.zeros(1 + ERROR_BYTES, dtype=torch.uint8, device=device)
    if first == axis.rank:
        bad_input = isinstance(error, ValueError)
        described = str(error) if bad_input else f"rank {axis.rank} failed: {type(error).__name__}: {error}"
        data = bytes([bad_input]) + described.encode()[:ERROR_BYTES]
        text[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    dist.broadcast(text, group=axis.group, group_src=int(first))
    if error is not None:
        raise error
    bad_input, *found = text.tolist()
    kind = ValueError if bad_input else AnotherRankError
    raise kind(bytes(found).rstrip(b"\0").decode(errors="replace"))


@dataclass(frozen=True)
class ParallelMesh:
    """The axes of a layout. ``cp`` is ring x ulysses flattened (ring outermost), ``world`` is all of them.

    ``cp.rank`` equals ``ring.rank * ulysses.degree + ulysses.rank``: it names the shard of the sequence that this rank
    holds. The same shard is held by all ranks of its tp group.
    """

    ring: Axis
    ulysses: Axis
    tp: Axis
    cp: Axis
    world: Axis
    device_type: str

    @classmethod
    def create(cls, ranks: torch.Tensor, device_type: str, copies: bool = False) -> ParallelMesh | None:
        """Make the process groups of a mesh. Collective over the default group, also for ranks outside the mesh.

        Args:
            ranks: ``[ring, ulysses, tp]``, the global rank at each place.
            device_type: ``"cuda"`` or ``"cpu"``.
            copies: of the axes that blocks exchange on, see `Axis`.

        Returns:
            The mesh as this rank sees it, or None on a rank outside it.
        """
        mesh = cls(
            ring=axis_among(ranks.permute(1, 2, 0).flatten(0, 1), copies),
            ulysses=axis_among(ranks.transpose(1, 2).flatten(0, 1), copies),
            tp=axis_among(ranks.flatten(0, 1), copies),
            cp=axis_among(ranks.flatten(0, 1).T),
            world=axis_among(ranks.flatten()[None]),
            device_type=device_type,
        )
        return mesh if (ranks == dist.get_rank()).any() else None


def build_mesh(
    config: ParallelismConfig,
    device_type: str | None = None,
    copies: bool = False,
) -> ParallelMesh:
    """Build the mesh of a layout over the initialised default process group. Collective: every rank calls it.

    Args:
        config: degrees; their product must be the world size.
        device_type: ``"cuda"`` or ``"cpu"``; by default what the default group's backend serves.
        copies: whether blocks exchange by copy engines, which all ranks must be able to (`parallel.copies.usable`).

    Raises:
        ValueError: no process group is initialised, or the degrees do not multiply to its size.
    """
    if not dist.is_available() or not dist.is_initialized():
        if config.world_size == 1:
            return single_mesh(device_type or "cpu")
        raise ValueError(
            f"{config.describe()} needs an initialised process group: start the script with "
            f"'torchrun --nproc_per_node={config.world_size} ...' and call torch.distributed.init_process_group() first"
        )
    config.check_world(dist.get_world_size())
    device_type = device_type or default_device_type()
    if config.world_size == 1:
        return single_mesh(device_type)
    shape = (config.ring_size, config.ulysses_size, config.tp_size)
    mesh = ParallelMesh.create(torch.arange(config.world_size).view(shape), device_type, copies)
    assert mesh is not None
    return mesh


def default_device_type() -> str:
    """The device type that the default process group moves tensors of."""
    # A group that serves several device types tells them only in its full configuration.
    if torch.cuda.is_available() and "nccl" in str(dist.get_backend_config()):
        return "cuda"
    return "cpu"


def single_mesh(device_type: str) -> ParallelMesh:
    """The mesh of one rank: nothing is split, no process group is needed."""
    return ParallelMesh(SINGLE, SINGLE, SINGLE, SINGLE, SINGLE, device_type)
