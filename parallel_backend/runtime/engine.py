"""The model as one rank holds it, and the four things it can do: encode text, predict, decode and encode images."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cache.block_cache import BlockCache
from ..cache.config import CacheSettings
from ..cache.decision import Decision, Evaluation
from ..config import ParallelismConfig
from ..loading.checkpoint import open_checkpoint
from ..loading.pipeline_folder import PipelineFolder
from ..loading.weight_loader import load_weights
from ..mesh import SINGLE, build_mesh, raise_together
from ..parallelize import parallelize_transformer, shard_text_model, text_axis


class Engine:
    """One rank's part of a pipeline: transformer and text encoder shards, and on rank 0 the whole VAE."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.kept: dict[str, Tensor] = {}
        self.weight_bytes: dict[str, int] = {}

    @torch.no_grad()
    def load(
        self,
        path: str,
        layout: ParallelismConfig,
        dtype: torch.dtype,
        on_progress: Callable[[int, int], None],
        keep_fp8: bool = False,
    ) -> None:
        """Read this rank's shards of a checkpoint.

        Args:
            path: a diffusers pipeline folder, or a transformer in one file.
            layout: degrees; their product is the world size.
            dtype: of the transformer and the text encoder; the VAE stays in fp32.
            keep_fp8: weights that are stored in fp8 stay so; else they are held as ``dtype`` too.
            on_progress: told bytes done and bytes in all, a few times a second at most.
        """
        source = open_checkpoint(Path(path))
        self.family, self.dtype = source.family, dtype
        mesh = build_mesh(layout, self.device.type)

        self.transformer = self.family.build_transformer(source.transformer_config)
        transformer_table = parallelize_transformer(self.transformer, self.family, layout, mesh)
        self.cache = BlockCache(self.transformer, self.family.block_stacks, mesh.world)
        parts = [("transformer", self.transformer, transformer_table)]
        if isinstance(source, PipelineFolder):
            self.text_layers = self.family.text_layers(source.text_config)
            self.text = self.family.build_text_model(source.text_config)
            axis = text_axis(self.family, source.text_config, mesh)
            parts.append(
                ("text_encoder", self.text, shard_text_model(self.text, self.family, source.text_config, axis))
            )

        total = sum(p.numel() for _, model, _ in parts for p in model.parameters()) * dtype.itemsize
        done = 0
        step = max(1, total // 50)

        def count(new: int) -> None:
            nonlocal done
            done += new
            if (done - new) // step != done // step:
                on_progress(done, total)

        for name, model, table in parts:
            # The transformer's slices are the same on all ranks of cp; the text encoder is spread over all ranks.
            replicas = mesh.cp if name == "transformer" else SINGLE
            error: ValueError | None = None
            try:
                self.weight_bytes[name] = load_weights(
                    model, source.weights(name), table,
                    device=self.device, dtype=dtype, replicas=replicas, on_bytes=count,
                    fp8="stored" if keep_fp8 else "cast",
                )  # fmt: skip
            except ValueError as found:
                error = found
            raise_together(error, mesh.world)
            model.to(self.device)  # buffers
        if self.rank == 0 and isinstance(source, PipelineFolder):
            self.vae = self.family.load_vae(source.path / "vae").to(self.device)
            self.weight_bytes["vae"] = sum(p.nbytes for p in self.vae.parameters())
        on_progress(total, total)

    def keep(self, tensors: Mapping[str, Tensor], forget: list[str]) -> None:
        """Keep conditioning on the device under its name, until it is forgotten."""
        for name in forget:
            self.kept.pop(name, None)
        for name, tensor in tensors.items():
            self.kept[name] = tensor.to(self.device, self.dtype)

    @torch.no_grad()
    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Context ``[B, L, C]`` from token ids and mask ``[B, L]``."""
        return self.family.encode_text(self.text, ids.to(self.device), mask.to(self.device), self.text_layers)

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        guidance: Tensor | None,
        context: str,
        references: list[str],
        cache: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Decision | None]:
        """Prediction ``[B, C, H, W]`` for latent ``x`` at ``timestep [B]`` (sigma, 0 to 1); on every rank the same.

        With ``cache`` (``settings`` and ``evaluation``) also what the cache decided.
        """
        missing = [name for name in (context, *references) if name not in self.kept]
        if missing:
            raise ValueError(f"conditioning {', '.join(missing)} was not sent to the workers")
        x = x.to(self.device, self.dtype)
        inputs = self.family.transformer_inputs(
            x,
            timestep.to(self.device),
            self.kept[context],
            None if guidance is None else guidance.to(self.device),
            [self.kept[name] for name in references],
        )
        if cache is not None:
            self.cache.plan(CacheSettings.from_dict(cache["settings"]), Evaluation(**cache["evaluation"]))
        output = self.transformer(**inputs, return_dict=False)[0]
        return self.family.prediction(output, x), self.cache.last

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` in -1..1; on rank 0."""
        return self.family.decode_latent(self.vae, latent.to(self.device, torch.float32))

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Latent ``[B, C, h, w]`` from an image ``[B, 3, H, W]`` in -1..1; on rank 0."""
        return self.family.encode_image(self.vae, image.to(self.device, torch.float32))

    def stats(self) -> dict[str, object]:
        """This rank's figures, under the names that docs/report.md explains."""
        if self.device.type == "cuda":
            peak, name = torch.cuda.max_memory_allocated(self.device), torch.cuda.get_device_name(self.device)
        else:
            peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "cpu"
        return {
            "rank": self.rank,
            "device": str(self.device),
            "device_name": name,
            "weight_bytes": dict(self.weight_bytes),
            "peak_bytes": peak,
            "cache_bytes": self.cache.kept_bytes(),
        }
