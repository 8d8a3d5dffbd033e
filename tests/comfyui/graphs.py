"""Building graphs in API form, and comparing what this pack's loader gives with what the reference loader gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.errors import relative_error

from .server import ComfyServer, RunResult

Source = Any
"""An input's value, a node id (its output 0), or ``(node id, output)``."""


class NodeId(str):
    """The id of a node; as an input it stands for the node's output 0."""


class Graph(dict):
    """A graph in API form: ``latent = graph.add("EmptyFlux2LatentImage", width=128, height=128, batch_size=1)``."""

    def add(self, class_type: str, **inputs: Source) -> NodeId:
        """Add a node; a NodeId or ``(NodeId, output)`` among the inputs is a link."""
        node = NodeId(len(self) + 1)
        self[str(node)] = {"class_type": class_type, "inputs": {k: _value(v) for k, v in inputs.items()}}
        return node


def _value(source: Source) -> Any:
    if isinstance(source, NodeId):
        return [str(source), 0]
    if isinstance(source, tuple):
        return [str(source[0]), source[1]]
    return source


def add_layout(graph: Graph, ulysses: int = 2, ring: int = 1, tp: int = 1, devices: str = "cpu", **more: Any) -> NodeId:
    """A Parallel Layout; the default is the one that most tests share, so that they share a group."""
    return graph.add("HybridDiT_ParallelLayout", ulysses=ulysses, ring=ring, tp=tp, devices=devices, **more)


def add_loader(graph: Graph, pipeline: str = "tiny", **layout: Any) -> NodeId:
    """This pack's loader with a layout; its outputs are MODEL, CLIP, VAE."""
    return graph.add("HybridDiT_LoadPipeline", pipeline=pipeline, layout=add_layout(graph, **layout), dtype="auto")


def add_reference(graph: Graph, pipeline: str = "tiny") -> NodeId:
    """The loader of the reference pack, with the same outputs."""
    return graph.add("ReferencePipelineLoader", pipeline=pipeline)


def add_prompt(graph: Graph, loader: NodeId, text: str = "a red circle on a blue square") -> NodeId:
    """The conditioning of a text."""
    return graph.add("CLIPTextEncode", text=text, clip=(loader, 1))


def add_latent(graph: Graph, width: int = 128, height: int = 128, batch_size: int = 1) -> NodeId:
    """An empty latent; sizes in pixels."""
    return graph.add("EmptyFlux2LatentImage", width=width, height=height, batch_size=batch_size)


def add_sampler(
    graph: Graph, loader: NodeId, *, model: Source = None, positive: Source = None, **changes: Any
) -> NodeId:
    """A KSampler of two Euler steps on an empty latent, with what differs from that in ``changes``."""
    inputs: dict[str, Any] = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    inputs |= {"denoise": 1.0, "model": model or (loader, 0), "positive": positive or add_prompt(graph, loader)}
    inputs |= changes
    inputs.setdefault("negative", inputs["positive"])
    if "latent_image" not in inputs:
        inputs["latent_image"] = add_latent(graph)
    return graph.add("KSampler", **inputs)


def save_latent(graph: Graph, samples: Source) -> NodeId:
    """Have a latent written where `saved_latent` finds it."""
    return graph.add("SaveLatent", samples=samples, filename_prefix="latents/test")


def saved_latent(server: ComfyServer, result: RunResult, node: NodeId) -> Tensor:
    """The latent that a SaveLatent node wrote."""
    (file,) = result.outputs[str(node)]["latents"]
    return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"].float()


def run_well(server: ComfyServer, graph: dict[str, Any], timeout: float = 120.0, **options: Any) -> RunResult:
    """Run a graph that has to succeed."""
    result = server.run(graph, timeout=timeout, **options)
    if result.error is not None:
        where = "".join(result.error.get("traceback", []))
        raise AssertionError(f"{result.error['node_type']}: {result.error['exception_message']}\n{where}")
    assert not result.interrupted
    return result


def latents_of_both(
    server: ComfyServer, build: Callable[[Graph, NodeId], Source], **layout: Any
) -> tuple[Tensor, Tensor]:
    """The latent of the graph that ``build(graph, loader)`` makes: this pack's, and the reference's."""
    graph = Graph()
    saves = [save_latent(graph, build(graph, add(graph))) for add in (lambda g: add_loader(g, **layout), add_reference)]
    result = run_well(server, graph)
    ours, reference = (saved_latent(server, result, save) for save in saves)
    return ours, reference


def unload(server: ComfyServer) -> None:
    """End all worker groups."""
    graph = Graph()
    graph.add("HybridDiT_UnloadWorkers", after=add_latent(graph))
    run_well(server, graph)


_seeds = itertools.count(1000)


def assert_still_draws(server: ComfyServer, **layout: Any) -> RunResult:
    """The server draws a new picture and it is right: whatever went wrong before has left nothing behind."""
    graph = Graph()
    seed = next(_seeds)  # of its own, or the answer would come from ComfyUI's cache
    saves = []
    for loader in (add_loader(graph, **layout), add_reference(graph)):
        saves.append(save_latent(graph, add_sampler(graph, loader, seed=seed)))
    result = run_well(server, graph)
    ours, reference = (saved_latent(server, result, save) for save in saves)
    assert relative_error(ours, reference) <= 1e-4  # see test_model.TOLERANCE
    return result
