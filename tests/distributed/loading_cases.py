"""Loading a single file on the ranks of the test world, and what each rank read of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from parallel_backend.config import ParallelismConfig
from parallel_backend.loading import weight_loader
from parallel_backend.loading.file_reader import FileReader
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.mesh import ParallelMesh, raise_together
from parallel_backend.parallel.products import Product, named_weights
from parallel_backend.parallelize import parallelize_transformer


@contextmanager
def counting_reads(path: str, cut: int = 0) -> Iterator[list[int]]:
    """A list that fills with the bytes of each read of weights.

    Args:
        path: of the file.
        cut: so many bytes are missing at the file's end for reads, though it was whole when it was opened.
    """
    read: list[int] = []

    class Counted(FileReader):
        def _read_run(self, descriptor: int, offset: int, into: Any) -> None:
            if offset + len(into) > Path(path).stat().st_size - cut:
                raise ValueError(f"the file ends at byte {offset}")
            super()._read_run(descriptor, offset, into)

        def read(self, part: Any, into: Any) -> None:
            super().read(part, into)
            read.append(part.nbytes)

    weight_loader.FileReader = Counted
    try:
        yield read
    finally:
        weight_loader.FileReader = FileReader


def load(
    mesh: ParallelMesh, layout: ParallelismConfig, path: str, fp8: str = "cast", cut: int = 0
) -> tuple[dict[str, torch.Tensor], dict, int, str]:
    """What this rank stores of the weights, its table, the bytes that it read, and its error; see `counting_reads`."""
    source = open_single_file(path)
    model = source.family.transformer.build(source.transformer_config)
    table = parallelize_transformer(model, source.family.transformer, layout, mesh)
    error: ValueError | None = None
    with counting_reads(path, cut) as read:
        try:
            weight_loader.load_weights(
                model, source.weights("transformer"), table,
                device=torch.device("cpu"), dtype=torch.float32, replicas=mesh.cp, fp8=fp8,
            )  # fmt: skip
        except ValueError as found:
            error = found
    raised = ""
    try:
        raise_together(error, mesh.world)
    except ValueError as together:
        raised = str(together)
    stored = {
        name: weight.tensors()[0] if isinstance(weight, Product) else weight.data
        for name, weight in named_weights(model).items()
    }
    return stored, table, sum(read), raised
