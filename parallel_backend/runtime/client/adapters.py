"""Which patches of weights the ranks of a group have, so that each tensor of a LoRA is sent once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...loading.adapters import AdapterSet, described, packed
from .same_content import same_content

KEPT_BYTES = 8 * 2**30
"""Tensors of sets that are not on any more stay with the ranks, in host memory, up to so many bytes in all."""
_SENT = (torch.float32, torch.bfloat16, torch.float16)


class SentAdapters:
    """What the ranks were sent of one component's patches.

    A tensor is known by its place in memory, and held meanwhile; or, where a file is read again, by its content.
    """

    def __init__(self) -> None:
        self.applied = ""
        """Name of the set that is on."""
        self.title = ""
        """Its title."""
        self._held: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._unsure: list[str] = []
        """Names that the ranks may have or not, as the wait for them was given up."""
        self._count = 0

    def prepare(self, adapters: AdapterSet) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of the message `Adapt` for a set, and the names that ranks are to forget.

        Raises:
            ValueError: a new tensor holds values that are no finite numbers; names its weight.
        """
        self.applied, self.title = "unknown", ""  # until it is `done`
        self._unsure += self._pending
        self._pending = {}
        names = {_identity(tensor): name for name, tensor in self._held.items()}
        looks: dict[tuple[Any, ...], list[str]] = {}
        used: set[str] = set()

        def name_of(tensor: Tensor) -> str:
            name = names.get(_identity(tensor))
            if name is None:
                if not looks:  # hardly ever there is something new
                    for held, other in self._held.items():
                        looks.setdefault(_look(other), []).append(held)
                same = (one for one in looks.get(_look(tensor), ()) if same_content(self._held[one], tensor))
                name = next(same, None)
                if name is not None:
                    names[_identity(tensor)], self._held[name] = name, tensor
            if name is None:
                self._count += 1
                name = names[_identity(tensor)] = f"a{self._count}"
                self._pending[name] = tensor
            used.add(name)
            return name

        description = described(adapters, name_of)
        for key, patches in adapters.patches.items():
            for tensor in (tensor for patch in patches for tensor in patch.all_tensors):
                if names[_identity(tensor)] in self._pending and not _is_finite(tensor):
                    raise ValueError(f"the LoRA's weight for {key} holds values that are not finite numbers")
        index, data = packed(description, {name: _as_sent(tensor) for name, tensor in self._pending.items()})
        total = sum(tensor.nbytes for tensor in (*self._held.values(), *self._pending.values()))
        for name in [name for name in self._held if name not in used]:
            if total > KEPT_BYTES:
                total -= self._held.pop(name).nbytes
                self._unsure.append(name)
        return {"index": index, "data": data}, list(self._unsure)

    def done(self, adapters: AdapterSet) -> None:
        """The ranks have all that `prepare` gave, and the set is on."""
        self._held.update(self._pending)
        self._pending, self._unsure = {}, []
        self.applied, self.title = adapters.name, adapters.title


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _look(tensor: Tensor) -> tuple[Any, ...]:
    """What tensors of the same content have in common, and hardly any others."""
    flat = tensor.detach().reshape(-1)
    return tuple(tensor.shape), tensor.dtype, tuple(flat[:: max(1, len(flat) // 16)][:16].float().tolist())


def _is_finite(tensor: Tensor) -> bool:
    # As it is sent: a copy in fp32 of all of a LoRA would take longer than sending it.
    values = tensor if tensor.dtype in _SENT else tensor.float()
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def _as_sent(tensor: Tensor) -> Tensor:
    """On the CPU, in a dtype that every rank reads; 8 bits become 16, which hold the same values."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype in _SENT else tensor.to(torch.bfloat16 if tensor.itemsize == 1 else torch.float32)
