"""What the ranks of the test world run: a transformer from a quantized file."""

from __future__ import annotations

import itertools

import torch

from parallel_backend.blocks import double_stream as blocks
from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.families import Conditioning
from parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet, Patch
from parallel_backend.mesh import ParallelMesh
from parallel_backend.runtime.rank.transformer_component import TransformerComponent
from tests.single_file import CHANNELS, TEXT, flux2_shapes

from .adapter_cases import SIZE, component
from .loading_cases import counting_reads


def prediction(
    mesh: ParallelMesh, layout: ParallelismConfig, path: str, fp8: str, moved: bool = False
) -> tuple[torch.Tensor, int, int]:
    """A transformer's prediction for a picture with a reference, bytes that this rank read, and those that it holds.

    Args:
        mesh, layout: of the ranks.
        path: of the file.
        fp8: what becomes of its weights.
        moved: whether its weights go to host memory and come back before.
    """
    with counting_reads(path) as read:
        part = component(mesh, layout, path, fp8)
    blocks.TILE = 2  # row-parallel outputs come in two pieces
    if moved:
        part.to_host()
        part.to_device()
    assert part.settings.speed == AS_IT_IS
    return evaluate(part), sum(read), part.nbytes


def evaluate(part: TransformerComponent) -> torch.Tensor:
    """The prediction for a picture with a reference."""
    generator = torch.Generator().manual_seed(1)
    x, reference = (
        torch.randn(1, CHANNELS, 5, 7, generator=generator),
        torch.randn(1, CHANNELS, 3, 4, generator=generator),
    )
    context = torch.randn(1, 11, TEXT, generator=generator)
    kind = part.settings.family.transformer
    conditioning = Conditioning(context, [reference], {"guidance": torch.full((1,), 3.5)})
    inputs = kind.inputs(x, torch.full((1,), 0.7), conditioning)
    return kind.evaluate(part.module, inputs, x).clone()


def other_patches() -> AdapterSet:
    """For every matrix of the blocks a patch that no two thin matrices are, of all kinds in turn."""
    generator = torch.Generator().manual_seed(5)

    def loha(rows: int, columns: int) -> Patch:
        sides = ((rows, 2), (2, columns), (rows, 2), (2, columns))
        return Patch("loha", tuple(torch.randn(side, generator=generator) for side in sides), 0.01)

    def lokr(rows: int, columns: int) -> Patch:
        sides = ((4, 4), (rows // 4, columns // 4))
        return Patch("lokr", tuple(torch.randn(side, generator=generator) for side in sides), 0.01)

    def diff(rows: int, columns: int) -> Patch:
        return Patch("diff", (torch.randn(rows, columns, generator=generator),), 0.01, model_strength=0.9)

    def dora(rows: int, columns: int) -> Patch:
        thin = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        return Patch("lora", thin, 0.6, dora=1 + torch.rand(rows, 1, generator=generator), alpha=0.01)

    def oft(rows: int, columns: int) -> Patch:
        turns = torch.linalg.qr(torch.randn(rows // 16, 16, 16, generator=generator))[0]
        return Patch("oft", (turns,), 0.3)

    kinds = itertools.cycle((loha, lokr, diff, dora, oft))
    matrices = {key: shape for key, shape in flux2_shapes(**SIZE).items() if "blocks" in key and len(shape) == 2}
    return AdapterSet("others", {key: [next(kinds)(*shape)] for key, shape in matrices.items()})


def with_other_patches(
    mesh: ParallelMesh, layout: ParallelismConfig, path: str, meant: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Predictions with patches: of a quantized file, and of what it stands for; the first without any, and whether it
    is the same again to the bit, in the same memory, once they are off."""
    part, exact = component(mesh, layout, path, "matmul"), component(mesh, layout, meant)
    plain, held = evaluate(part), part.nbytes
    for one in (part, exact):
        one.adapt(other_patches())
    on = evaluate(part)
    part.adapt(NO_ADAPTERS)
    return on, evaluate(exact), plain, torch.equal(evaluate(part), plain) and part.nbytes == held
