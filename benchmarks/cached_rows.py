"""A batch whose rows each have a block cache of their own, so that many prompts are measured in one run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from parallel_backend.cache.block_cache import BlockStack
from parallel_backend.cache.config import CacheSettings
from parallel_backend.cache.decision import Decision, StreamRules
from parallel_backend.cache.taylorseer import Forecast


class CachedRows:
    """What `BlockCache` does at batch 1, for each row of a batch by itself, with its rules and its forecasts.

    Blocks in the middle run on the rows whose step is computed. Rows share timestep and guidance.

    Args:
        transformer: its lists of blocks are replaced.
        stacks: those lists, in the order in which they run.
    """

    def __init__(self, transformer: Any, stacks: Sequence[BlockStack]) -> None:
        self.decisions: list[list[Decision]] = []
        self._settings: CacheSettings | None = None
        first = 0
        for stack in stacks:
            blocks = getattr(transformer, stack.attribute)
            setattr(transformer, stack.attribute, _Blocks(blocks, self, stack, first))
            first += len(blocks)
        self.blocks = first

    def begin(self, settings: CacheSettings | None, rows: int, steps: int) -> None:
        """Begin a run; without settings each step is computed in full."""
        self._settings, self.decisions, self._step = settings, [], -1
        if settings is None:
            return
        settings.config.check_blocks(self.blocks, "this model")
        if settings.config.Bn_compute_blocks:
            raise ValueError(f"Bn_compute_blocks is 0 here; got {settings.config.Bn_compute_blocks}")
        self._head = settings.config.Fn_compute_blocks
        self._rules = [StreamRules(settings.config, steps) for _ in range(rows)]
        self._forecasts = [Forecast(settings.order) for _ in range(rows)]
        self._residual: Tensor | None = None

    @property
    def computed(self) -> list[int]:
        """Computed steps of each row."""
        return [sum(decision.computed for decision in row) for row in zip(*self.decisions, strict=True)]

    def run_block(self, stack: BlockStack, index: int, block: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a block of the whole sequence on the rows that need it."""
        if self._settings is None:
            return block(*args, **kwargs)
        kwargs = dict(inspect.signature(block.forward).bind(*args, **kwargs).arguments)
        inputs = tuple(kwargs[name] for name in stack.streams)
        if index == 0:
            self._step += 1
            self._before = inputs[-1]
        if index < self._head:
            outputs = _as_tuple(block(**kwargs))
        elif self._chosen.numel():
            taken = {name: _rows(value, self._chosen, len(self._rules)) for name, value in kwargs.items()}
            # The streams are down to the chosen rows already.
            outputs = _as_tuple(block(**{**taken, **dict(zip(stack.streams, inputs, strict=True))}))
        else:
            outputs = inputs
        if index == self._head - 1:
            outputs = self._decide(outputs)
        if index == self.blocks - 1:
            outputs = (self._whole(outputs[0]),)
        return outputs if len(stack.streams) > 1 else outputs[0]

    def _decide(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep all rows at the end of the first blocks, and go on with those that are computed."""
        residual = outputs[-1][:, -self._before.shape[1] :] - self._before
        if self._residual is None:
            self._residual = torch.zeros_like(residual)
        change = (residual - self._residual).abs().sum(dim=(1, 2))
        diffs = (change / self._residual.abs().sum(dim=(1, 2))).tolist()
        decisions = []
        for rules, diff in zip(self._rules, diffs, strict=True):
            decision = rules.before_measuring(float(self._step), self._step > 0) or rules.after_measuring(diff)
            rules.note(decision)
            decisions.append(decision)
        self.decisions.append(decisions)
        mask = torch.tensor([decision.computed for decision in decisions], device=residual.device)
        self._chosen = mask.nonzero()[:, 0]
        self._residual[self._chosen] = residual[self._chosen]
        self._entry = outputs
        return tuple(tokens[self._chosen] for tokens in outputs)

    def _whole(self, middle: Tensor) -> Tensor:
        """The middle blocks' output of all rows, computed or forecast."""
        out = torch.cat(self._entry, dim=1)
        added = middle - out[self._chosen]
        for place, row in enumerate(self._chosen.tolist()):
            self._forecasts[row].update((added[place],), float(self._step))
        rest = [row for row, decision in enumerate(self.decisions[-1]) if not decision.computed]
        if rest:
            out[rest] += torch.stack([self._forecasts[row].at(float(self._step))[0] for row in rest])
        out[self._chosen] = middle
        return out


class _Blocks(nn.ModuleList):
    """A list that hands out its blocks with the rows' caches around them."""

    def __init__(self, blocks: nn.ModuleList, rows: CachedRows, stack: BlockStack, first: int) -> None:
        super().__init__(blocks)
        self.rows, self.stack, self.first = rows, stack, first

    def __iter__(self) -> Iterator[Callable[..., Any]]:  # type: ignore[override]
        for index, block in enumerate(super().__iter__()):
            yield partial(self.rows.run_block, self.stack, self.first + index, block)


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _rows(value: Any, chosen: Tensor, count: int) -> Any:
    """The chosen rows of every tensor in a value that has a batch of ``count``."""
    return tree_map(lambda t: t[chosen] if isinstance(t, Tensor) and t.ndim and len(t) == count else t, value)
