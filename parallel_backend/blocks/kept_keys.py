"""Keys and values of cross-attention, which depend on weights and conditioning alone: made once, used in each step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..parallel.tensor import Model

Keys = tuple[Tensor | None, ...]


class BlockKeys:
    """What blocks make of one conditioning, each when it is first asked.

    Args:
        sources: as the caller gave them; held, so that no other tensor gets their identity.
        rows: tokens of all samples.
    """

    def __init__(self, sources: Sequence[Tensor | None], rows: int) -> None:
        self.sources, self.rows = sources, rows
        self.embedded: Keys = ()
        self._of_blocks: dict[Model, Keys] = {}

    def of(self, block: Model, make: Callable[..., Keys]) -> Keys:
        """What ``make(block, *embedded)`` gave when it was first asked for a block."""
        if block not in self._of_blocks:
            self._of_blocks[block] = make(block, *self.embedded)
        return self._of_blocks[block]

    def nbytes(self) -> int:
        """Memory that it takes."""
        every = [self.embedded, *self._of_blocks.values()]
        return sum(tensor.nbytes for tensors in every for tensor in tensors if tensor is not None)


class KeptKeys:
    """Those of the conditionings that come again in each step, the least recently used of which goes first.

    Args:
        most: tokens of all that are kept. A conditioning with more by itself is not kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[tuple[tuple[int, int], ...], BlockKeys] = OrderedDict()

    def begin(self, sources: Sequence[Tensor | None], embed: Callable[..., Keys]) -> BlockKeys:
        """A forward begins: what is kept of its conditioning, or a new one, for ``embed(*sources)``.

        Args:
            sources: ``[B, L, C]`` each; the same tensors have the same content, unless they were written to.
            embed: what the model makes of them for all blocks.
        """
        version = [0 if t is None or t.is_inference() else t._version for t in sources]
        key = tuple((id(t), number) for t, number in zip(sources, version, strict=True))
        found = self._kept.get(key)
        if found is None:
            found = BlockKeys(sources, sum(t.shape[:2].numel() for t in sources if t is not None))
            found.embedded = embed(*sources)
            if found.rows > self.most or torch.is_grad_enabled():
                return found
            while self._kept and found.rows + sum(one.rows for one in self._kept.values()) > self.most:
                self._kept.popitem(last=False)
            self._kept[key] = found
        self._kept.move_to_end(key)
        return found

    def nbytes(self) -> int:
        """Memory that all take."""
        return sum(one.nbytes() for one in self._kept.values())

    def forget(self) -> None:
        """Free all: the weights have changed, or their memory is needed."""
        self._kept.clear()
