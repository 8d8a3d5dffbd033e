"""A sequence sharded over cp: how many tokens of each stream a rank holds, cutting inputs and gathering outputs.

Shards may be uneven by one token. No token is ever padded, so there is no padding that attention would have to skip;
only the last gather pads its buffers, and drops the padding again.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..mesh import ParallelMesh, all_gather


def split_sizes(length: int, parts: int, *, extras_last: bool = False) -> list[int]:
    """Sizes of ``parts`` nearly equal shards of ``length`` tokens; the odd tokens go to the first (or last) shards."""
    base, extra = divmod(length, parts)
    sizes = [base + (index < extra) for index in range(parts)]
    return sizes[::-1] if extras_last else sizes


class Entrance:
    """What one model does with its inputs around the cut, besides being cut."""

    def prepare(self, arguments: dict[str, Any]) -> None:
        """Change the arguments of a forward, by name, before the sequence is cut; all tensors are full."""

    def localize(self, arguments: dict[str, Any]) -> None:
        """Change them after the sequence was cut; tensors of the sequence are rank-local."""

    def forget_graphs(self) -> None:
        """Forget CUDA graphs, which know where the weights are, and give their memory back."""

    def forget_values(self) -> None:
        """Forget what was made of the weights, which have other values now, or its memory is needed."""

    def remove(self) -> None:
        """Leave the model as it was."""


class SequenceShards:
    """How the token streams of the forward in progress are spread over the cp ranks.

    A rank holds its shard of every stream (such as text and image), one after the other. Every length is known to every
    rank beforehand, so no sizes are ever exchanged.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh = mesh
        self.streams: list[list[int]] = []
        self.kept_keys: list[list[Tensor]] | None = None
        """For each ring position and sample, which tokens of the chunk that is held there are keys; None if all are."""

    def begin(self, lengths: Sequence[int]) -> None:
        """Start a forward whose streams have these full lengths (tokens)."""
        # Odd tokens of every second stream go to the last ranks, so that one rank does not collect them all.
        self.streams = [
            split_sizes(length, self.mesh.cp.degree, extras_last=bool(index % 2))
            for index, length in enumerate(lengths)
        ]
        self.kept_keys = None

    def length(self, stream: int) -> int:
        """Full length of a stream (tokens)."""
        return sum(self.streams[stream])

    def hide_keys(self, stream: int, mask: Tensor, device: torch.device) -> None:
        """Have nobody attend to some tokens of a stream in the forward that has begun.

        They are dropped before the kernel, for each sample by itself, wherever a layout has put them.

        Args:
            stream: the others keep all their tokens.
            mask: ``[B, S]`` of the full stream, False where a token is hidden; on the CPU, the same on all ranks.
            device: of the tensors to come.
        """
        masks = [mask if index == stream else None for index in range(len(self.streams))]
        self.kept_keys = []
        for position in range(self.mesh.ring.degree):
            first = position * self.mesh.ulysses.degree
            parts = []
            for cp_rank in range(first, first + self.mesh.ulysses.degree):
                for other, sizes in zip(masks, self.streams, strict=True):
                    start, size = sum(sizes[:cp_rank]), sizes[cp_rank]
                    ones = mask.new_ones(mask.shape[0], size)
                    parts.append(ones if other is None else other[:, start : start + size])
            chunk = torch.cat(parts, dim=1)
            self.kept_keys.append([row.nonzero().flatten().to(device) for row in chunk])

    def tokens(self, cp_rank: int) -> int:
        """Tokens of all streams that a cp rank holds."""
        return sum(sizes[cp_rank] for sizes in self.streams)

    def ulysses_tokens(self, ring_rank: int | None = None) -> list[int]:
        """Tokens held by each rank of the ulysses group on a ring position (this rank's by default)."""
        ring_rank = self.mesh.ring.rank if ring_rank is None else ring_rank
        first = ring_rank * self.mesh.ulysses.degree
        return [self.tokens(first + index) for index in range(self.mesh.ulysses.degree)]

    def ring_tokens(self) -> list[int]:
        """Tokens of each ring position's chunk, all its ulysses ranks together."""
        return [sum(self.ulysses_tokens(position)) for position in range(self.mesh.ring.degree)]

    def shard(self, full: Tensor, stream: int, dim: int) -> Tensor:
        """This rank's part of a full tensor along its token dim."""
        sizes = self.streams[stream]
        return full.narrow(dim, sum(sizes[: self.mesh.cp.rank]), sizes[self.mesh.cp.rank])

    def gather(self, local: Tensor, stream: int) -> Tensor:
        """The full ``[B, S, C]`` from every rank's ``[B, S_local, C]``."""
        if not self.mesh.cp.is_split:
            return local
        sizes = self.streams[stream]
        longest = max(sizes)
        if local.shape[1] < longest:
            local = torch.cat([local, local.new_zeros(local.shape[0], longest - local.shape[1], local.shape[2])], 1)
        gathered = all_gather(local, self.mesh.cp)  # [cp, B, longest, C]
        return torch.cat([gathered[index, :, :size] for index, size in enumerate(sizes)], dim=1)


def shard_sequence(
    model: nn.Module,
    shards: SequenceShards,
    inputs: Sequence[Sequence[str]],
    output_stream: int,
    entrance: Entrance,
) -> list[Any]:
    """Cut the model's inputs to this rank's tokens and gather its output, with forward hooks on this instance.

    Args:
        model: the model whose ``forward`` enters and leaves the sharded region.
        shards: told the lengths of each forward.
        inputs: for each stream the names of its arguments, the token dim of each being the second to last; the first
            name of a stream gives its length. None: the entrance cuts and gathers.
        output_stream: the stream that the output (``.sample`` or the first of a tuple, ``[B, S_local, C]``) belongs to.
        entrance: sees the arguments before and after they are cut.

    Returns:
        Handles whose ``remove()`` undoes it.
    """
    signature = inspect.signature(type(model).forward)

    def cut(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bound = signature.bind(module, *args, **kwargs)
        arguments = bound.arguments
        entrance.prepare(arguments)
        if inputs:
            shards.begin([arguments[names[0]].shape[-2] for names in inputs])
        if shards.mesh.cp.is_split:
            for stream, names in enumerate(inputs):
                for name in names:
                    arguments[name] = shards.shard(arguments[name], stream, -2)
        entrance.localize(arguments)
        return bound.args[1:], bound.kwargs

    def gather(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (shards.gather(output[0], output_stream), *output[1:])
        output.sample = shards.gather(output.sample, output_stream)
        return output

    handles = [model.register_forward_pre_hook(cut, with_kwargs=True)]
    if inputs and shards.mesh.cp.is_split:
        handles.append(model.register_forward_hook(gather))
    return handles
