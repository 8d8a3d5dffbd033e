"""What the ranks of the test world run: Wan's VAEs cut over the ranks, against diffusers' own whole ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.families.vaes.wan import WanVAE
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallel.tensor import Model
from parallel_backend.runtime.rank.component import ModelSettings
from parallel_backend.runtime.rank.vae_component import Piece, VAEComponent
from tests.errors import relative_error
from tests.wan_vae import CONFIGS, tiny_vae, whole_decode, whole_encode


def through(vae: Model, kind: str, decodes: bool, mesh: ParallelMesh, clip: Tensor) -> Tensor:
    """A clip through a VAE of `CONFIGS`, piece by piece."""
    family = WanVAE()
    sizes = (family.latent_pieces if decodes else family.image_pieces)(clip.shape[2])
    pieces = clip[:, :, : sum(sizes)].split(sizes, 2)
    run = family.start(vae, CONFIGS[kind], decodes, mesh.world, pieces[0].shape)
    done = torch.cat([run.piece(piece) for piece in pieces], 2)
    return done.clamp(-1.0, 1.0) if decodes else done


def _clips(kind: str, size: tuple[int, int], frames: int, batch: int) -> tuple[Tensor, Tensor]:
    """A latent of a size, and pictures of that size with so many latent frames and a picture more."""
    shape = WanVAE().latent_shape(CONFIGS[kind])
    generator = torch.Generator().manual_seed(1)
    height, width = size
    latent = torch.randn(batch, shape.channels, frames, height, width, generator=generator)
    pixels = batch, 3, shape.pictures(frames) + 1, height * shape.downscale, width * shape.downscale
    return latent, torch.randn(pixels, generator=generator).mul(0.5).clamp(-1, 1)


def both_ways(
    mesh: ParallelMesh, layout: ParallelismConfig, kind: str, size: tuple[int, int], frames: int = 3, batch: int = 1
) -> tuple[float, float]:
    """The errors of decoding and encoding."""
    vae = tiny_vae(kind)
    latent, image = _clips(kind, size, frames, batch)
    # diffusers' own forward first: it is replaced on the instance.
    expected = whole_decode(vae, latent), whole_encode(vae, image[:, :, :-1])
    actual = through(vae, kind, True, mesh, latent), through(vae, kind, False, mesh, image)
    assert [a.shape for a in actual] == [e.shape for e in expected]
    return relative_error(actual[0], expected[0]), relative_error(actual[1], expected[1])


class _RunsOut(TorchDispatchMode):
    """Has memory run out at the ``at``-th of all operations on real tensors."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("out of memory. Tried to allocate 7.00 GiB")
        return function(*args, **(kwargs or {}))


def after_failures(
    mesh: ParallelMesh, layout: ParallelismConfig, kind: str, decodes: bool, moments: list[int]
) -> list[tuple[str, float]]:
    """For each moment how the piece ended on this rank where the last runs out of memory, and the next clip's error.

    A rank whose piece is whole all the same has got what the failing one had put in its place.
    """
    vae = tiny_vae(kind)
    clip = _clips(kind, (7, 5), 2, 1)[0 if decodes else 1]
    expected = (whole_decode if decodes else whole_encode)(vae, clip if decodes else clip[:, :, :-1])
    family, results = WanVAE(), []
    for moment in moments:
        lengths = (family.latent_pieces if decodes else family.image_pieces)(clip.shape[2])
        pieces = clip[:, :, : sum(lengths)].split(lengths, 2)
        run = family.start(vae, CONFIGS[kind], decodes, mesh.world, pieces[0].shape)
        run.piece(pieces[0])
        ended = "done"
        try:
            if mesh.world.rank == mesh.world.degree - 1:
                with _RunsOut(moment):
                    run.piece(pieces[1])
            else:
                run.piece(pieces[1])
        except torch.OutOfMemoryError:
            ended = "out of memory"
        results.append((ended, relative_error(through(vae, kind, decodes, mesh, clip), expected)))
    return results


def component_after_a_failure(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, Any]:
    """What a rank's component says where the last rank fails in the second piece of a clip, and of the clips after."""
    part = VAEComponent(
        ModelSettings(open_checkpoint(Path(path)), layout, mesh, torch.device("cpu"), torch.float32, "cast", AS_IT_IS)
    )
    part.load(lambda count: None)
    clip, _ = _clips("2.1", (7, 5), 2, 1)
    expected = whole_decode(tiny_vae("2.1"), clip)

    def piece(run: str, index: int) -> Tensor:
        return part.together(clip[:, :, index : index + 1], True, Piece(run, index == 0, index == 1))

    def failed(run: str) -> tuple[str, str]:
        try:
            piece(run, 1)
        except Exception as error:
            return type(error).__name__, str(error)
        return "", ""

    piece("a", 0)
    if mesh.world.rank == mesh.world.degree - 1:
        with _RunsOut(100):
            first = failed("a")
    else:
        first = failed("a")
    agreed = part.agreed
    gone = failed("a")  # what it kept of the first piece is no more
    piece("b", 0)
    part.forget("another")
    part.forget("b")
    forgotten = failed("b")
    again = torch.cat([piece("c", 0), piece("c", 1)], 2).clamp(-1.0, 1.0)
    return {
        "first": first,
        "agreed": agreed,
        "gone": gone,
        "forgotten": forgotten,
        "error": relative_error(again, expected),
        "workspace": part.workspace(part.pixels(clip[:, :, :1], True, Piece("d"))),
        "later": part.workspace(part.pixels(clip[:, :, :1], True, Piece("d", is_first=False))),
    }
