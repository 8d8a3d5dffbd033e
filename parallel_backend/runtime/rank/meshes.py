"""The meshes of a rank's group: one for each layout that a model in it has, built once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...config import ParallelismConfig
from ...mesh import ParallelMesh, build_mesh, groups_in_use
from ...parallel import copies
from .mesh_check import MeshCheck


class Meshes:
    """Builds meshes, and counts what is exchanged over them.

    Args:
        device: of this rank.
        check: whether the ranks of a new mesh reach each other.
        notify: told why copy engines cannot be used.
    """

    def __init__(self, device: torch.device, check: MeshCheck, notify: Callable[[str], None]) -> None:
        self.device, self.check, self.notify = device, check, notify
        self._built: dict[tuple[ParallelismConfig, bool], ParallelMesh] = {}

    def of(self, layout: ParallelismConfig, copy_engines: bool) -> ParallelMesh:
        """The mesh of a layout, over which ranks were seen to reach each other. Collective where it is a new one.

        Raises:
            UnreachedError: they do not.
        """
        key = layout, copy_engines
        if key not in self._built:
            self.check.meet()
            with self.check.within("all ranks", range(layout.world_size)):
                mesh = build_mesh(layout, self.device.type, copies.usable(copy_engines, self.notify))
            self.check.run(mesh)
            self._built[key] = mesh
        return self._built[key]

    def collectives_begun(self) -> int | None:
        """How many collectives this rank has begun on the groups of all its models; None where it cannot be known."""
        meshes = list(self._built.values())
        if self.device.type == "cuda" and any(mesh.ring.is_split and not mesh.ring.copies for mesh in meshes):
            return None  # NCCL does not count what is sent from rank to rank
        groups = groups_in_use()
        numbers = (group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
        return sum(numbers) + sum(copies.begun(group.group_name) for group in groups)
