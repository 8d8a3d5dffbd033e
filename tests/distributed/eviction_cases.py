"""Making room on ranks that see different amounts of memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.families import Conditioning
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.mesh import ParallelMesh, raise_together
from parallel_backend.runtime.rank.component import ModelSettings, Place
from parallel_backend.runtime.rank.components import COMPONENTS
from parallel_backend.runtime.rank.eviction import Eviction
from parallel_backend.runtime.rank.residents import Residents
from parallel_backend.runtime.rank.text_component import VisionComponent


def make_room(mesh: ParallelMesh, layout: ParallelismConfig, size: int, fullest: int) -> tuple[list[str], str, int]:
    """Three parts of 10 bytes on devices of 100, but for one rank's: places afterwards, the error, and its own view."""
    rank = mesh.world.rank
    parts = [_part(f"part {number}") for number in range(3)]
    total = 35 if rank == fullest else 100
    room = Eviction(
        torch.device("cpu"),
        mesh.world,
        lambda _: None,
        lambda: total - sum(part.nbytes for part in parts if part.place is Place.DEVICE),
        lambda: 10**12,
    )
    error = ""
    try:
        room.make(size, 0, "the next part", [(part, False) for part in parts])
    except ValueError as found:
        error = str(found)
    return [part.place.value for part in parts], error, room.least_available()


def fail_alone(mesh: ParallelMesh, layout: ParallelismConfig, failing: int, error: Exception) -> tuple[str, str]:
    """What a rank raises where one of them has an error: its class, and its text."""
    try:
        raise_together(error if mesh.world.rank == failing else None, mesh.world)
    except Exception as found:
        return type(found).__name__, str(found)
    return "", ""


def load_without_memory(mesh: ParallelMesh, layout: ParallelismConfig, path: str, component: str) -> tuple[str, str]:
    """What a rank raises where the first one has no memory for a component, and where the component is then."""
    settings = ModelSettings(
        open_checkpoint(Path(path)), layout, mesh, torch.device("cpu"), torch.float32, "cast", AS_IT_IS
    )
    part = COMPONENTS[component](settings)
    with pytest.MonkeyPatch.context() as patch:
        if mesh.world.rank == 0:

            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise MemoryError("none left")

            patch.setattr(type(settings.family.needs_vae()), "load", refuse)
            patch.setattr("parallel_backend.runtime.rank.component.load_weights", refuse)
        try:
            part.load(lambda count: None)
        except Exception as found:
            return type(found).__name__, part.place.value
    return "", part.place.value


def see_without_memory(mesh: ParallelMesh, layout: ParallelismConfig) -> str:
    """What a rank raises where the first one has no memory for what its vision tower is shown."""

    def refuse(*args: Any) -> Any:
        raise MemoryError("none left")

    part: Any = object.__new__(VisionComponent)
    family = SimpleNamespace(needs_text_encoder=lambda: SimpleNamespace(encode_images=refuse))
    part.settings = SimpleNamespace(mesh=mesh, device=torch.device("cpu"), family=family)
    part.module = None
    try:
        part.encode([])
    except Exception as found:
        return type(found).__name__
    return ""


def _part(label: str) -> Any:
    part = SimpleNamespace(nbytes=10, place=Place.DEVICE, label=label, host=None)

    def drop() -> None:
        part.place = Place.FILE

    part.drop = drop
    return part


def lend(mesh: ParallelMesh, layout: ParallelismConfig, path: str, lender: int) -> tuple[list[int], bool, bool]:
    """A rank lends half of its transformer, twice.

    Returns:
        Bytes that this rank has lent after each time, whether evaluations afterwards are equal to the bit, and whether
        all of it is back.
    """
    settings = ModelSettings(
        open_checkpoint(Path(path)), layout, mesh, torch.device("cpu"), torch.float32, "cast", AS_IT_IS
    )
    part = COMPONENTS["transformer"](settings)
    part.load(lambda count: None)
    held = lambda: part.nbytes - part.lent_bytes  # noqa: E731
    room = Eviction(torch.device("cpu"), mesh.world, lambda _: None, lambda: 10**12, lambda: 10**12, held, lambda: None)
    residents = Residents(room)
    kind = settings.family.transformer
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(1, *shape, generator=generator) for shape in ((128, 4, 4), (7, 192)))

    def evaluate() -> torch.Tensor:
        residents.bring("m", part, 23)
        conditioning = Conditioning(context, tensors={"guidance": torch.tensor([4.0])})
        return kind.evaluate(part.module, kind.inputs(x, torch.tensor([0.5]), conditioning), x)

    with torch.no_grad():
        expected, lent, equal = evaluate(), [], []
        for _ in range(2):
            residents.lend(part.nbytes // 2, [lender])
            lent.append(part.lent_bytes)
            equal.append(torch.equal(evaluate(), expected))
    return lent, all(equal), part.lent_bytes == 0
