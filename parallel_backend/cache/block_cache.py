"""The mechanism: blocks of a transformer that are skipped where the residual of the first ones has hardly changed.

Dual block caching is cache-dit's (DBCache); it grew out of First Block Cache (ParaAttention). Here all lists of blocks
of a model are one sequence with one decision, whatever streams of tokens the blocks of each list carry, and the ranks
of a parallel model decide as one.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import Axis
from ..parallel.elementwise import change
from .config import CacheSettings, DBCacheConfig
from .decision import NO_NUMBER, Decision, Evaluation, StreamRules
from .taylorseer import Forecast

Model = Any
Tokens = tuple[Tensor, ...]
"""One tensor ``[B, S, C]`` for each stream of tokens."""


@dataclass(frozen=True)
class BlockStack:
    """One of a transformer's lists of blocks.

    Args:
        attribute: the transformer's attribute that holds the list.
        streams: the blocks' arguments that carry tokens, in the order in which a block returns them. The image's tokens
            come last, both here and where a later list carries all streams as one; among them those of the picture come
            before those of its references.
    """

    attribute: str
    streams: tuple[str, ...]


def count_blocks(transformer: Model, stacks: Sequence[BlockStack]) -> int:
    """Blocks in all of a transformer's lists."""
    return sum(len(getattr(transformer, stack.attribute)) for stack in stacks)


@dataclass
class _Stream:
    """What is kept of one conditioning stream between its evaluations: this rank's shards."""

    rules: StreamRules
    forecast: Forecast
    shapes: tuple[torch.Size, ...] = ()
    picture: int | None = None  # the picture's tokens; None before the first forward of these shapes
    residual: Tensor | None = None  # of the first blocks, the picture's tokens only, when last computed
    norm: Tensor | None = None  # its L1 norm over all ranks' shards is the denominator


class BlockCache:
    """Caches the blocks of one transformer. `plan` says how, before each forward; without it nothing is different.

    Args:
        transformer: its lists of blocks are replaced by lists that hold the same blocks under the same names.
        stacks: those lists, in the order in which they run.
        axis: all ranks of the model, which decide as one. (The residual is spread over cp only; tp ranks hold copies
            of it, which may differ in the last bit on unlike GPUs, and so must not decide alone.)
        picture_tokens: how many of this rank's image tokens are the picture's and no reference's, from the arguments of
            a forward as they are after they were cut; without it all are. References change less from step to step.
    """

    def __init__(
        self,
        transformer: Model,
        stacks: Sequence[BlockStack],
        axis: Axis,
        picture_tokens: Callable[[Mapping[str, Any]], int] | None = None,
    ) -> None:
        self.transformer, self.stacks, self.axis = transformer, stacks, axis
        self.picture_tokens = picture_tokens
        self._signature = inspect.signature(type(transformer).forward)
        self.originals = {stack.attribute: getattr(transformer, stack.attribute) for stack in stacks}
        self.blocks = count_blocks(transformer, stacks)
        self.last: Decision | None = None
        self.current: _Pass | None = None
        self._planned: _Pass | None = None
        self._streams: OrderedDict[tuple[str, str], _Stream] = OrderedDict()
        first = 0
        for stack in stacks:
            blocks = self.originals[stack.attribute]
            setattr(transformer, stack.attribute, _SteppedBlocks(blocks, self, stack, first))
            first += len(blocks)
        self._hooks = [
            # First of all hooks: it looks at the arguments before the sequence is cut.
            transformer.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Give the transformer its own lists of blocks back."""
        for hook in self._hooks:
            hook.remove()
        for attribute, blocks in self.originals.items():
            setattr(self.transformer, attribute, blocks)

    def plan(self, settings: CacheSettings, evaluation: Evaluation) -> None:
        """Have the next forward, and only that, use the cache. Every rank calls it with the same arguments.

        Raises:
            ValueError: settings that leave no block to skip, or a mask by name where the number of steps is unknown.
        """
        settings.config.check_blocks(self.blocks, f"this {type(self.transformer).__name__}")
        key = (evaluation.run, evaluation.stream)
        if key not in self._streams:
            self._streams[key] = _Stream(StreamRules(settings.config, evaluation.steps), Forecast(settings.order))
        self._streams.move_to_end(key)
        self._planned = _Pass(self, settings.config, evaluation.position, self._streams[key])

    def forget(self, run: str) -> None:
        """Free what is kept of a run that has ended."""
        for key in [key for key in self._streams if key[0] == run]:
            del self._streams[key]

    def keeps(self, evaluation: Evaluation) -> bool:
        """Whether something is kept of a stream, or was planned to be."""
        return (evaluation.run, evaluation.stream) in self._streams

    def runs(self) -> list[str]:
        """The runs of which something is kept, the least recently used first."""
        return list(dict.fromkeys(run for run, _ in reversed(self._streams)))[::-1]

    def growth_bytes(self) -> int:
        """Memory that this rank's residuals will take beside `kept_bytes`, once all derivatives are there."""
        return sum(stream.forecast.growth_bytes() for stream in self._streams.values())

    def kept_bytes(self) -> int:
        """Memory that this rank's residuals take."""
        return sum(
            tensor.nbytes
            for stream in self._streams.values()
            for tensor in (stream.residual, *(t for values in stream.forecast.derivatives for t in values))
            if tensor is not None
        )

    def _begin(self, _: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.last, self.current = None, None
        if self._planned is None:
            return
        self.current, self._planned = self._planned, None
        stream = self.current.stream
        # Shapes of whole arguments, the same on all ranks; a shard may keep its shape where another rank's changes.
        given = [value if isinstance(value, list) else [value] for value in (*args, *kwargs.values())]
        shapes = tuple(value.shape for values in given for value in values if isinstance(value, Tensor))
        if shapes != stream.shapes:
            # Another resolution, batch or prompt length: nothing that is kept fits.
            stream.shapes, stream.picture, stream.residual = shapes, None, None
            stream.forecast = Forecast(stream.forecast.order)

    def _enter(self, transformer: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The sequence has been cut, if it is. Once a run and conditioning, as the count may wait for the device."""
        if self.current is not None and self.current.stream.picture is None and self.picture_tokens is not None:
            arguments = self._signature.bind(transformer, *args, **kwargs).arguments
            self.current.stream.picture = self.picture_tokens(arguments)

    def _end(self, *_: Any) -> None:
        if self.current is not None:
            self.last, self.current = self.current.decision, None


class _SteppedBlocks(nn.ModuleList):
    """A list of blocks that, while a forward uses the cache, hands out its blocks with the cache around them.

    The blocks stay what and where they are, so names of weights, hooks and compiled blocks do.
    """

    def __init__(self, blocks: nn.ModuleList, cache: BlockCache, stack: BlockStack, first: int) -> None:
        super().__init__(blocks)
        self.cache, self.stack, self.first = cache, stack, first

    @property
    def is_cached(self) -> bool:
        """Whether the forward in progress uses the cache, and so looks at what blocks return."""
        return self.cache.current is not None

    def __iter__(self) -> Iterator[Any]:
        blocks = list(super().__iter__())
        current = self.cache.current
        if current is None:
            return iter(blocks)
        return iter(
            [functools.partial(current.step, self.stack, self.first + i, block) for i, block in enumerate(blocks)]
        )


class _Pass:
    """One forward that uses the cache."""

    def __init__(self, cache: BlockCache, config: DBCacheConfig, position: float, stream: _Stream) -> None:
        self.axis, self.position, self.stream = cache.axis, position, stream
        self.head = config.Fn_compute_blocks
        self.tail = cache.blocks - config.Bn_compute_blocks
        self.decision: Decision | None = None
        self.before: Tokens = ()
        self.entry: Tokens = ()

    def step(self, stack: BlockStack, index: int, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run or skip a block of the whole sequence; same arguments and results as the block's own."""
        if args:
            kwargs = dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)  # type: ignore[attr-defined]
        inputs: Tokens = tuple(kwargs[name] for name in stack.streams)
        if index == 0:
            self.before = inputs
        cached = self.decision is not None and not self.decision.computed
        if cached and index < self.tail:
            outputs = inputs
        else:
            result = block(**kwargs)
            outputs = result if isinstance(result, tuple) else (result,)
        if index == self.head - 1:
            self._decide(outputs)
        if index == self.tail - 1:
            outputs = self._leave_middle(outputs)
        return outputs if len(stack.streams) > 1 else outputs[0]

    def _decide(self, outputs: Tokens) -> None:
        """After the first blocks: are the middle ones computed?"""
        stream, self.entry = self.stream, outputs
        image = outputs[-1]
        if len(outputs) < len(self.before):
            # All streams run as one by now, the image's tokens last.
            image = image[:, image.shape[1] - self.before[-1].shape[1] :]
        image, before = image[:, : stream.picture], self.before[-1][:, : stream.picture]
        decision = stream.rules.before_measuring(self.position, stream.residual is not None)
        if decision is None or decision.computed:
            residual, sums = change(image, before, stream.residual if decision is None else None)
        if decision is None:
            decision = stream.rules.after_measuring(self._difference(sums))
            if decision.reason == NO_NUMBER:
                stream.forecast = Forecast(stream.forecast.order)  # or each forecast to come would be none, either
        stream.rules.note(decision)
        self.decision = decision
        if decision.computed:
            stream.residual, stream.norm = residual, sums[0]
        self.before = ()

    def _difference(self, sums: Tensor) -> float:
        """Relative L1 difference from the residual that was last computed, over all ranks: sums in fp32, one host sync.

        Sums, not means: a rank with more tokens counts for more. Not a number where a residual of any rank is none, or
        where all are 0, of which no share can be told.

        Args:
            sums: of this rank, as `change` gives them.
        """
        assert self.stream.norm is not None
        both = torch.stack([sums[1], self.stream.norm])
        if self.axis.is_split:
            dist.all_reduce(both, group=self.axis.group)
        difference, norm = _to_host(both)
        return difference / norm if 0 < norm < math.inf else math.nan

    def _leave_middle(self, outputs: Tokens) -> Tokens:
        """At the end of the middle blocks: keep what they added, or add a forecast of it."""
        assert self.decision is not None
        forecast, position = self.stream.forecast, self.position
        if not self.decision.computed:
            return tuple(tokens + added for tokens, added in zip(outputs, forecast.at(position), strict=True))
        entry = self.entry
        if len(outputs) < len(entry):
            entry = (torch.cat(entry, dim=1),)
        forecast.update(tuple(b - a for a, b in zip(entry, outputs, strict=True)), position)
        return outputs


def _to_host(sums: Tensor) -> list[float]:
    """The one wait for the device."""
    if sums.device.type != "cuda":
        return sums.tolist()
    # Into pinned memory, which the device writes without the driver's staging.
    out = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
    out.copy_(sums, non_blocking=True)
    torch.cuda.current_stream(sums.device).synchronize()
    return out.tolist()
