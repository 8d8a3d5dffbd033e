"""What the ranks of the test world run: a transformer from a quantized file."""

from __future__ import annotations

import torch

from parallel_backend.blocks import double_stream as blocks
from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.families import Conditioning
from parallel_backend.mesh import ParallelMesh
from tests.single_file import CHANNELS, TEXT

from .adapter_cases import component
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
    generator = torch.Generator().manual_seed(1)
    x, reference = (
        torch.randn(1, CHANNELS, 5, 7, generator=generator),
        torch.randn(1, CHANNELS, 3, 4, generator=generator),
    )
    context = torch.randn(1, 11, TEXT, generator=generator)
    with counting_reads(path) as read:
        part = component(mesh, layout, path, fp8)
    blocks.TILE = 2  # row-parallel outputs come in two pieces
    if moved:
        part.to_host()
        part.to_device()
    kind = part.settings.family.transformer
    conditioning = Conditioning(context, [reference], {"guidance": torch.full((1,), 3.5)})
    inputs = kind.inputs(x, torch.full((1,), 0.7), conditioning)
    assert part.settings.speed == AS_IT_IS
    return kind.evaluate(part.module, inputs, x).clone(), sum(read), part.nbytes
