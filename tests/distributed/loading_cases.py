"""Loading a single file on the ranks of the test world, and what each rank read of it."""

from __future__ import annotations

from typing import Any

import torch

from parallel_backend.config import ParallelismConfig
from parallel_backend.loading import weight_loader
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.mesh import ParallelMesh, raise_together
from parallel_backend.parallelize import parallelize_transformer


def load(
    mesh: ParallelMesh, layout: ParallelismConfig, path: str, keep_fp8: bool = False
) -> tuple[dict[str, torch.Tensor], dict, int, str]:
    """This rank's parameters, its table, the elements that it read, and the error that it raised."""
    source = open_single_file(path)
    model = source.family.build_transformer(source.transformer_config)
    table = parallelize_transformer(model, source.family, layout, mesh)
    read, reader = [], weight_loader._Source._reader

    def counted(self: Any, *arguments: Any) -> Any:
        one = reader(self, *arguments)

        def call() -> torch.Tensor:
            chunk = one()
            read.append(chunk.numel())
            return chunk

        return call

    weight_loader._Source._reader = counted
    error: ValueError | None = None
    try:
        weight_loader.load_weights(
            model, source.weights("transformer"), table,
            device=torch.device("cpu"), dtype=torch.float32, replicas=mesh.cp, keep_fp8=keep_fp8,
        )  # fmt: skip
    except ValueError as found:
        error = found
    finally:
        weight_loader._Source._reader = reader
    raised = ""
    try:
        raise_together(error, mesh.world)
    except ValueError as together:
        raised = str(together)
    return {name: p.data for name, p in model.named_parameters()}, table, sum(read), raised
