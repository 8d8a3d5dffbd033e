"""Blocks of an instance whose forward is ours: what replaces it, compiled or not, and how it is given back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config

from ..config import Speed
from ..parallel import exchange, signs
from ..parallel.attention import Lengths, ShardedAttention
from ..parallel.graphs import BlockGraphs
from ..parallel.tensor import Model
from .double_stream import Kept

_INDUCTOR_OPTIONS: dict[str, Any] = {
    # Both would move what runs under an exchange to where its result is used, behind the wait.
    "reorder_for_locality": False,
    "reorder_for_peak_memory": False,
}
_OPTIONS_OF_COPIES: dict[str, Any] = {
    # What arrives lies in memory that others write to, which the compiler would take for a buffer to use again.
    "inplace_buffers": False,
    "allow_buffer_reuse": False,
    # So what comes of it is kept where it is needed again, rather than computed anew when it may have been overwritten:
    # that reads four tensors at least, the two terms of a sum, a gate, and what they are added to.
    "realize_reads_threshold": 3,
}


class BlockForwards:
    """The forward of some blocks of one model, replaced on the instances.

    Args:
        attention: over the sharded sequence.
        speed: how they run.
        stacks: the model's lists of blocks, in the order in which they run.
    """

    def __init__(self, attention: ShardedAttention, speed: Speed, stacks: Sequence[Sequence[Model]]) -> None:
        self.attention, self.speed = attention, speed
        self.blocks = [block for stack in stacks for block in stack]
        self.places = {block: index for index, block in enumerate(self.blocks)}
        mesh = attention.shards.mesh
        self.axes = (mesh.ulysses, mesh.ring, mesh.tp)
        self.graphs = BlockGraphs(len(self.blocks)) if speed.cuda_graphs else None

    def begin(self, arguments: Mapping[str, Any], transformer: Model) -> None:
        """A forward of the model with these arguments begins."""
        for axis in self.axes:
            exchange.begin(axis)
        if self.graphs is None:
            return
        stacks = [module for module in transformer.children() if isinstance(module, nn.ModuleList)]
        cached = any(getattr(stack, "is_cached", False) for stack in stacks)
        self.graphs.begin(not cached and arguments.get("controlnet_block_samples") is None)

    def replace(
        self, blocks: Sequence[Model], streams: int, core: Callable[..., Any], forward: Callable[..., Any]
    ) -> None:
        """Give blocks another forward.

        Args:
            blocks: of one kind.
            streams: how many of the tensors carry tokens; they come first.
            core: computes a block: ``(block, attention, *tensors, lengths, kept)``.
            forward: ``(run, block, <the arguments of the block's own forward>)``; it calls ``run(block, *tensors)``.
        """
        run = _Runner(core, streams, self)
        for block in blocks:
            block.forward = _bind(forward, run, block)

    def forget_graphs(self) -> None:
        """Forget recorded CUDA graphs, as weights move."""
        if self.graphs is not None:
            self.graphs.forget()

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        for block in self.blocks:
            del block.forward
        self.blocks.clear()
        self.places.clear()


class _Runner:
    """Calls the function of one kind of block, or its compiled form."""

    def __init__(self, core: Callable[..., Any], streams: int, forwards: BlockForwards) -> None:
        self.core, self.streams, self.forwards, self.attention = core, streams, forwards, forwards.attention
        self.compiled = None
        if forwards.speed.compile:
            options = _INDUCTOR_OPTIONS | (_OPTIONS_OF_COPIES if any(axis.copies for axis in forwards.axes) else {})
            self.compiled = torch.compile(core, fullgraph=True, dynamic=True, options=options)

    def __call__(self, block: Model, *tensors: Any) -> Any:
        signs.block(tensors[0].device)
        graphs, lengths, kept = self.forwards.graphs, self.attention.lengths(), self.attention.shards.kept_keys
        if graphs is None or kept is not None:
            return self._run(block, tensors, lengths, kept)
        run = functools.partial(self._run, block, lengths=lengths, kept=None)
        return graphs.call(self.forwards.places[block], self.streams, run, tensors, lengths)

    def _run(self, block: Model, tensors: tuple[Any, ...], lengths: Lengths, kept: Kept) -> Any:
        if self.compiled is None or kept is not None:
            # Batches whose prompts differ in length drop keys sample by sample, which no one graph does.
            return self.core(block, self.attention, *tensors, lengths, kept)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                # Features, of which some decide which kernel runs: their number is the model's.
                torch._dynamo.mark_static(tensor, tensor.ndim - 1)
        before = shape_config.use_duck_shape
        # Two sizes that happen to be equal in the first forward need not be in the next.
        shape_config.use_duck_shape = False
        try:
            return self.compiled(block, self.attention, *tensors, lengths, None)
        finally:
            shape_config.use_duck_shape = before


def _bind(forward: Callable[..., Any], run: _Runner, block: Model) -> Callable[..., Any]:
    """A block's forward, with the names of the arguments that it has."""

    def bound(*args: Any, **kwargs: Any) -> Any:
        return forward(run, block, *args, **kwargs)

    signature = inspect.signature(forward)
    bound.__signature__ = signature.replace(parameters=list(signature.parameters.values())[2:])  # type: ignore[attr-defined]
    return bound


def refuse(**others: Any) -> None:
    """Raise ValueError for what a block was given and cannot do."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"under parallelism the model takes no {', '.join(given)}; drop masked tokens instead, and call it without "
            "kv_cache"
        )
