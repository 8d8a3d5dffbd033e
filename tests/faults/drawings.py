"""The graphs that faults happen to: every part of a picture on two ranks, and what comes of it to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.comfyui.cache_graphs import add_cache
from tests.comfyui.graphs import (
    Graph,
    NodeId,
    add_latent,
    add_loader,
    add_prompt,
    add_sampler,
    run_well,
    save_latent,
    saved_latent,
)
from tests.comfyui.qwen_models import PIPELINE as QWEN
from tests.comfyui.server import ComfyServer, RunResult

LAYOUT = {"ulysses": 2, "ring": 1, "tp": 1}
"""Two ranks: the quickest to start."""
STEPS = 4
_seeds = itertools.count(1000)


class Drawing:
    """A graph that encodes, samples and decodes.

    Args:
        text: the prompt; ComfyUI encodes it only where the last graph had another.
        layout: degrees.
        pipeline: folder of FLUX.2 or Qwen-Image.
        cached: with a block cache.
        image: an input image that the latent is made of.
        options: of the sampler, such as ``seed`` and ``steps``; ``width`` and ``height`` of the latent, in pixels.
    """

    def __init__(
        self,
        text: str,
        layout: dict[str, int] | None = None,
        pipeline: str = "tiny",
        cached: bool = False,
        image: str | None = None,
        **options: Any,
    ) -> None:
        self.graph = Graph()
        self.loader = add_loader(self.graph, pipeline, **(layout or LAYOUT))
        self.prompt = add_prompt(self.graph, self.loader, text)
        size = {name: options.pop(name) for name in ("width", "height") if name in options}
        if image is not None:
            pixels = self.graph.add("LoadImage", image=image)
            latent = self.graph.add("VAEEncode", pixels=pixels, vae=(self.loader, 2))
        elif pipeline == QWEN:
            latent = self.graph.add("EmptySD3LatentImage", **({"width": 128, "height": 128, "batch_size": 1} | size))
        else:
            latent = add_latent(self.graph, **size)
        options = {"steps": STEPS, "positive": self.prompt, "latent_image": latent} | options
        if cached:
            options["model"] = add_cache(self.graph, (self.loader, 0))
        self.sampler = add_sampler(self.graph, self.loader, **options)
        self.latent = save_latent(self.graph, self.sampler)
        self.picture = self.graph.add("VAEDecode", samples=self.sampler, vae=(self.loader, 2))
        self.preview = self.graph.add("PreviewImage", images=self.picture)

    def run_well(self, server: ComfyServer) -> Tensor:
        """Draw; what was drawn: latent and picture in one."""
        return self.drawn(server, run_well(server, self.graph))

    def drawn(self, server: ComfyServer, result: RunResult) -> Tensor:
        """What was drawn by a run of the graph. All of it must have been: nothing comes from ComfyUI's cache."""
        latent = saved_latent(server, result, self.latent)
        (file,) = result.outputs[str(self.preview)]["images"]
        picture = torch.frombuffer(bytearray(server.image(**file).convert("RGB").tobytes()), dtype=torch.uint8)
        return torch.cat([latent.flatten(), picture.float()])


def other_drawing(server: ComfyServer) -> None:
    """Draw something new, so that a group is up and ComfyUI's cache has no part of another drawing but the loader."""
    Drawing("something else", seed=next(_seeds), steps=1, width=64, height=64).run_well(server)


class Ended:
    """An ``on_message`` that notes when a run came to its error or interruption (`time.time`), as ComfyUI says.

    The message may come later, for ComfyUI collects garbage before it has sent it.
    """

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, message: dict[str, Any]) -> None:
        if message["type"] in ("execution_error", "execution_interrupted"):
            self.at = message["data"]["timestamp"] / 1000


def node_of(drawing: Drawing, moment: str) -> set[NodeId]:
    """The nodes on which a fault at a moment shows."""
    return {
        "encode_text": {drawing.prompt},
        "decode": {drawing.picture},
        "predict": {drawing.sampler},
        "in step": {drawing.sampler},
        "between": {drawing.sampler},
        "collective": {drawing.prompt, drawing.sampler},
    }.get(moment, {drawing.loader, drawing.prompt})
