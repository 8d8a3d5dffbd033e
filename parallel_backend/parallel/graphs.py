"""All blocks of a forward as one CUDA graph, so that the host does not hold up small models and small shards."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

WARM = 2
"""Forwards of a size that run as they are before one is recorded."""
MOST = 2
"""Sizes whose graphs are kept, each with the memory of its activations: such as those of two prompts."""

Tensors = tuple[Any, ...]

_live: weakref.WeakSet[_Recording] = weakref.WeakSet()


def held_bytes() -> int:
    """About the memory that recorded graphs use, which PyTorch's allocator counts as unused."""
    return sum(recording.reserved for recording in _live)


class _Recording:
    """One size: what its blocks get from outside, and the graph.

    Blocks hand tokens on to one another within the graph. All else that they are given, and the first block's tokens,
    comes from outside and is copied to where the graph reads it.
    """

    def __init__(self) -> None:
        self.clear()
        _live.add(self)

    def clear(self) -> None:
        """Know nothing, as at first."""
        self.slots: dict[int, list[tuple[int, int]]] = {}  # block -> (argument, slot), where a slot is seen first
        self.places: dict[tuple[int, int], int] = {}  # (block, argument) -> slot
        self.statics: list[Tensor] = []
        self.noted = False
        """Whether a forward has shown all of that."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self.reserved = 0
        """Bytes that PyTorch's allocator took from the device while the graph was recorded."""

    def inputs(self, index: int, tensors: Tensors) -> Tensors:
        """A block's tensors, with those from outside where the graph reads them."""
        places = [self.places.get((index, argument)) for argument in range(len(tensors))]
        return tuple(x if at is None else self.statics[at] for x, at in zip(tensors, places, strict=True))


class BlockGraphs:
    """Records and replays the blocks of one model.

    While a graph is replayed, blocks only note what they are given; the last one launches the graph and returns what it
    made. So nothing may look at what other blocks return, as a cache would: `begin` says so.

    Args:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        self.last = blocks - 1
        self.seen: Counter[Hashable] = Counter()
        self.recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._usable = False
        self._now: _Recording | None = None
        self._capture: Any = None
        self._given: dict[int, Tensor] = {}

    def begin(self, usable: bool) -> None:
        """A forward begins, in which a graph may stand for the blocks."""
        self._abandon()
        self._usable, self._now = usable, None

    def forget(self) -> None:
        """Give up all recordings and their memory."""
        self._abandon()
        self.recordings.clear()
        self.seen.clear()
        self._now = None

    def call(self, index: int, streams: int, run: Callable[[Tensors], Any], tensors: Tensors, key: Hashable) -> Any:
        """Run a block, or leave it to the graph.

        Args:
            index: of the block, in the order in which all run.
            streams: how many of the tensors carry tokens; they come first.
            run: computes the block for tensors.
            tensors: of the block, None among them where there is none.
            key: what else, beside the tensors' sizes, makes a forward different.
        """
        if not self._usable or not tensors[0].is_cuda or torch.is_grad_enabled():
            return run(tensors)
        if index == 0:
            self._start(tensors, key)
        now = self._now
        if now is None:
            return run(tensors)
        if now.graph is not None and self._capture is None:
            for argument, slot in now.slots.get(index, ()):
                now.statics[slot].copy_(tensors[argument])
            if index < self.last:
                return tensors[0] if streams == 1 else tensors[:streams][::-1]
            now.graph.replay()
            return now.output
        if now.graph is None:
            result = run(self._note(index, streams, tensors))
            if index == self.last:
                now.noted = True
                self._given.clear()
            return result
        return self._record(index, run, tensors)

    def _start(self, tensors: Tensors, key: Hashable) -> None:
        self._abandon()
        key = (key, tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors))
        self.seen[key] += 1
        if self.seen[key] < WARM:
            return
        if key not in self.recordings:
            self.recordings[key] = _Recording()
            while len(self.recordings) > MOST:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        self._now = self.recordings[key]
        if self._now.noted and self._now.graph is None:
            self._now.graph = torch.cuda.CUDAGraph()
            self._now.reserved = -torch.cuda.memory_reserved()
            # Of other threads, such as the one that watches NCCL, no call must count.
            self._capture = torch.cuda.graph(self._now.graph, capture_error_mode="thread_local")
            self._capture.__enter__()

    def _note(self, index: int, streams: int, tensors: Tensors) -> Tensors:
        """In the last forward before a recording: what comes from outside?

        Returns:
            The block's tensors, with those from outside where the graph will read them. What is compiled for a tensor
            need not do for a copy of it (the tensor may be a view), and nothing can be compiled during a recording.
        """
        now = self._now
        assert now is not None
        if index == 0:
            now.clear()
        known = {id(tensor): slot for slot, tensor in self._given.items()}
        for argument in range(0 if index == 0 else streams, len(tensors)):
            tensor = tensors[argument]
            if tensor is None:
                continue
            slot = known.get(id(tensor))
            if slot is None:
                slot = known[id(tensor)] = len(self._given)
                self._given[slot] = tensor
                now.statics.append(_alike(tensor).copy_(tensor))
                now.slots.setdefault(index, []).append((argument, slot))
            now.places[index, argument] = slot
        return now.inputs(index, tensors)

    def _record(self, index: int, run: Callable[[Tensors], Any], tensors: Tensors) -> Any:
        now = self._now
        assert now is not None
        assert now.graph is not None
        for argument, slot in now.slots.get(index, ()):
            self._given[slot] = tensors[argument]
        try:
            result = run(now.inputs(index, tensors))
        except BaseException:
            self._abandon()
            raise
        if index < self.last:
            return result
        self._capture.__exit__(None, None, None)
        self._capture, now.output = None, result
        now.reserved += torch.cuda.memory_reserved()
        for slot, tensor in self._given.items():
            now.statics[slot].copy_(tensor)
        self._given.clear()
        now.graph.replay()
        return result

    def _abandon(self) -> None:
        """A forward broke off while it was recorded, or before."""
        if self._capture is not None:
            capture, self._capture = self._capture, None
            if self._now is not None:
                self._now.clear()
            with contextlib.suppress(RuntimeError):  # what broke the capture is raised already
                capture.__exit__(None, None, None)
        self._given.clear()


def _alike(x: Tensor) -> Tensor:
    """Memory for what is laid out like a tensor, of which compiled code knows the strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
