"""Pictures cut into bands, one a rank: what a convolution sees beyond its band's edge, and all bands together.

The ranks of an axis run the same layers, each on its band, and exchange as often as layers look beyond it. Where one of
them fails in the middle, the others would wait for it: it takes part in what is still to be exchanged
(`Bands.catch_up`) before all of them hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mesh import SINGLE, Axis
from .sequence import split_sizes

_functional = torch.ops._c10d_functional


class Bands:
    """The bands of one picture (or clip): each rank's is a run of rows or columns.

    Args:
        axis: over whose ranks it is cut. Where it is shorter than there are ranks, the last ones have the last band
            once more.
        length: of the side that is cut, in units that no rank has a part of.
        dim: that side: -2 for rows, -1 for columns.
    """

    def __init__(self, axis: Axis = SINGLE, length: int = 1, dim: int = -2) -> None:
        self.axis, self.dim = axis, dim
        self.sizes = [size for size in split_sizes(length, axis.degree) if size]
        self.index = min(axis.rank, len(self.sizes) - 1)
        self._begun = self._repeated = 0
        """Exchanges that this rank has taken part in, and those of them that it came by again in `catch_up`."""
        self._device = torch.device("cpu")

    @property
    def is_split(self) -> bool:
        return self.axis.is_split

    def own(self, whole: Tensor) -> Tensor:
        """This rank's band of ``whole``, of any scale: ``[..., n * length, ...]``."""
        scale = whole.shape[self.dim] // sum(self.sizes)
        return whole.narrow(self.dim, sum(self.sizes[: self.index]) * scale, self.sizes[self.index] * scale)

    def padded(self, clip: Sequence[Tensor], rows: int, columns: int) -> tuple[Tensor, tuple[int, int]]:
        """A band with what a convolution needs of its neighbours, and the padding that is left for the convolution.

        Args:
            clip: this rank's band, ``[..., H, W]``; several of ``[B, C, T, H, W]`` follow each other in time.
            rows, columns: zeros that the convolution of the whole picture would be padded with on either side.
        """
        if not self.is_split:
            return _joined(clip), (rows, columns)
        if self.dim == -2:
            return self.halo(clip, rows, rows), (0, columns)
        return self.halo(clip, columns, columns), (rows, 0)

    def halo(self, clip: Sequence[Tensor], before: int, after: int) -> Tensor:
        """A band between the last lines of the one before and the first of the one after; zeros beyond the picture."""
        if not before and not after:
            return _joined(clip)
        if not self.is_split:
            return F.pad(_joined(clip), (0, 0, before, after) if self.dim == -2 else (before, after))
        size = clip[0].shape[self.dim]
        edges = [(x.narrow(self.dim, 0, after), x.narrow(self.dim, size - before, before)) for x in clip]
        gathered = self._exchange(_joined([torch.cat(pair, self.dim) for pair in edges]))
        # One copy of what is large: neighbours and all of the clip go to their places at once.
        shape = list(gathered.shape[1:])
        shape[self.dim] = before + size + after
        padded = clip[0].new_empty(shape)
        above, below = padded.narrow(self.dim, 0, before), padded.narrow(self.dim, before + size, after)
        is_first, is_last = self.index == 0, self.index + 1 == len(self.sizes)
        above.zero_() if is_first else above.copy_(gathered[self.index - 1].narrow(self.dim, after, before))
        below.zero_() if is_last else below.copy_(gathered[self.index + 1].narrow(self.dim, 0, after))
        at, middle = 0, padded.narrow(self.dim, before, size)
        for x in clip:
            (middle if len(clip) == 1 else middle.narrow(2, at, x.shape[2])).copy_(x)
            at += x.shape[2]
        return padded

    def gather(self, x: Tensor) -> Tensor:
        """All bands side by side: the whole picture, on every rank."""
        if not self.is_split:
            return x
        scale = x.shape[self.dim] // self.sizes[self.index]
        short = max(self.sizes) * scale - x.shape[self.dim]
        padded = F.pad(x, (0, 0, 0, short) if self.dim == -2 else (0, short)) if short else x
        gathered = self._exchange(padded)
        bands = zip(gathered.unbind(0), self.sizes, strict=False)
        return torch.cat([band.narrow(self.dim, 0, size * scale) for band, size in bands], self.dim)

    def begin(self, device: torch.device) -> None:
        """Work on a picture begins, of which each rank does the same on its band."""
        self._begun = self._repeated = 0
        self._device = device

    def catch_up(self, work: Callable[[], object]) -> None:
        """Take part in the exchanges that are left after this rank has failed, with zeros.

        Args:
            work: the same that failed, on tensors of the meta device, which take no memory.
        """
        self._repeated = 0
        work()

    def _exchange(self, x: Tensor) -> Tensor:
        """Every rank's ``x``, in rank order: ``[degree, ...]``."""
        if x.is_meta:
            if self._repeated == self._begun:
                self._all_gather(torch.zeros(x.shape, dtype=x.dtype, device=self._device))
            self._repeated += 1
            return x.new_empty(self.axis.degree, *x.shape)
        return self._all_gather(x)

    def _all_gather(self, x: Tensor) -> Tensor:
        # What may lack memory comes first: what is not begun is still to be caught up with.
        x, gathered = x.contiguous(), x.new_empty(self.axis.degree, *x.shape)
        arriving = _functional.all_gather_into_tensor_out(
            x.view(-1), self.axis.degree, self.axis.name, out=gathered.view(-1)
        )
        self._begun += 1
        _functional.wait_tensor(arriving)
        return gathered


def _joined(clip: Sequence[Tensor]) -> Tensor:
    """Tensors that follow each other in time."""
    return clip[0] if len(clip) == 1 else torch.cat(list(clip), 2)
