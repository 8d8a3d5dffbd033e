"""The ComfyUI side of the pack: which nodes there are. Only this folder imports ``comfy``."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .block_cache import BlockCache
from .layout import ParallelLayout
from .load_checkpoint import LoadCheckpoint
from .load_vae import LoadVAE
from .loaders import LoadCLIP, LoadDiffusionModel, LoadPipeline
from .model_paths import offer_demo_loras
from .workers import UnloadWorkers, WorkersReport


class HybridDiTExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def on_load(self) -> None:
        offer_demo_loras()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ParallelLayout, LoadPipeline, LoadDiffusionModel, LoadCLIP, LoadVAE, LoadCheckpoint, BlockCache,
            WorkersReport, UnloadWorkers,
        ]  # fmt: skip
