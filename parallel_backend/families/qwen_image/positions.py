"""Where Qwen-Image's tokens are: grids of images, the text behind them, and the rotary embedding of both.

diffusers and ComfyUI agree on even sizes. They differ by one position in the middle of an odd number of rows or
columns, and in where the text begins beside a reference that is larger than the picture. Each is followed where its
arguments come from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...blocks.embedding import ExactTime
from ...parallel.sequence import Entrance, SequenceShards
from ...parallel.tensor import Model

if TYPE_CHECKING:
    from ...blocks.forwards import BlockForwards

THETA = 10_000.0
KEPT = 8
"""Rotary embeddings that are kept: prompts of different lengths take turns in a run."""


@dataclass(frozen=True)
class Grid:
    """The tokens of one image: how many in time, rows and columns, and the coordinates of the first of them."""

    frames: int
    rows: int
    columns: int
    time: int
    row: int
    column: int

    def coordinates(self) -> Tensor:
        """(time, row, column) of each token, ``[frames * rows * columns, 3]``."""
        sides = ((self.time, self.frames), (self.row, self.rows), (self.column, self.columns))
        axes = (torch.arange(first, first + count) for first, count in sides)
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


@dataclass(frozen=True)
class Placement:
    """Where all tokens of a forward are.

    Args:
        grids: of the picture, then of the references.
        text_start: all three coordinates of the first text token.
        references_at_zero: modulate references as at timestep 0.
    """

    grids: tuple[Grid, ...]
    text_start: int
    references_at_zero: bool


@dataclass(frozen=True)
class LatentImages:
    """What `Placement` is made of once the model is known: ``img_shapes`` of those who have latents, not tokens.

    Args:
        shapes: frames, rows and columns of latent positions, of the picture, then of the references.
        method: of ComfyUI's reference methods; None is the model's own.
        rule: ``comfyui`` or ``diffusers``, whose arithmetic is followed.
    """

    shapes: tuple[tuple[int, int, int], ...]
    method: str | None = None
    rule: str = "comfyui"

    def place(self, references_at_zero: bool) -> Placement:
        """The placement for a model that by itself takes references as at timestep 0, or not."""
        if self.rule == "diffusers":
            tokens = [(frames, -(-rows // 2), -(-columns // 2)) for frames, rows, columns in self.shapes]
            return placed_by_diffusers(tokens, references_at_zero)
        return placed_by_comfyui(self.shapes, self.method or ("index_timestep_zero" if references_at_zero else "index"))


def picture_tokens(shapes: Any) -> int:
    """Tokens of the picture, from ``img_shapes`` as diffusers has it: images of each sample, or one image for all."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return prod(first[0] if isinstance(first, list) else first)


def placed_by_diffusers(shapes: Sequence[tuple[int, int, int]], references_at_zero: bool) -> Placement:
    """The placement of images of (frames, rows, columns), as `QwenEmbedRope` has it."""
    grids = tuple(
        Grid(frames, rows, columns, index, rows // 2 - rows, columns // 2 - columns)
        for index, (frames, rows, columns) in enumerate(shapes)
    )
    start = max(max(grid.rows, grid.columns) // 2 for grid in grids)
    return Placement(grids, start, references_at_zero)


def placed_by_comfyui(shapes: Sequence[tuple[int, int, int]], method: str) -> Placement:
    """The placement of images of (frames, rows, columns), as ComfyUI's model has it for a reference method.

    Args:
        shapes: of the picture, then of the references; rows and columns of latent positions, two to a token.
        method: ``index`` and ``index_timestep_zero`` count references up in time, ``negative_index`` counts them down,
            ``offset`` puts all of them at time 1, beside or below one another.
    """

    def grid(shape: tuple[int, int, int], time: int, row: int = 0, column: int = 0) -> Grid:
        frames, rows, columns = shape[0], *(-(-side // 2) for side in shape[1:])
        row, column = ((offset + 1) // 2 for offset in (row, column))
        return Grid(frames, rows, columns, 0 if frames > 1 else time, row - rows // 2, column - columns // 2)

    picture, *references = shapes
    grids, height, width = [grid(picture, 0)], 0, 0
    for number, shape in enumerate(references, start=1):
        if method != "offset":
            grids.append(grid(shape, -number if method == "negative_index" else number))
            continue
        _, rows, columns = shape
        below = rows + height <= columns + width
        row, column = (height, 0) if below else (0, width)
        height, width = max(height, rows + row), max(width, columns + column)
        grids.append(grid(shape, 1, row, column))
    start = max(grids[0].rows, grids[0].columns) // 2
    return Placement(tuple(grids), start, method == "index_timestep_zero" and bool(references))


class RotaryPositions(nn.Module):
    """Stands where the transformer's ``pos_embed`` stands, and gives the embedding of this rank's tokens."""

    def __init__(self, axes_dims: Sequence[int]) -> None:
        super().__init__()
        self.axes_dims = tuple(axes_dims)
        self.current: tuple[Tensor, Tensor] | None = None
        self._kept: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines of text and image tokens, each ``[S_local, D]`` in fp32."""
        assert self.current is not None
        return self.current

    def place(self, placement: Placement, text: tuple[int, ...], shards: SequenceShards, device: torch.device) -> None:
        """Prepare the embedding for a forward; ``text`` has the index of each text token in the prompt."""
        key = (placement, text, tuple(map(tuple, shards.streams)), device)
        if key not in self._kept:
            text_rows = (placement.text_start + torch.tensor(text, dtype=torch.long))[:, None].expand(-1, 3)
            image_rows = torch.cat([grid.coordinates() for grid in placement.grids])
            local = torch.cat([shards.shard(text_rows, 0, 0), shards.shard(image_rows, 1, 0)])
            self._kept[key] = self._embed(local.to(device))
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        self.current = self._kept[key]

    def _embed(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        angles = []
        for axis, dims in enumerate(self.axes_dims):
            powers = torch.arange(0, dims, 2, device=coordinates.device, dtype=torch.float32) / dims
            angles.append(torch.outer(coordinates[:, axis].float(), 1.0 / THETA**powers))
        joint = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
        return joint.cos(), joint.sin()


class QwenEntrance(Entrance):
    """Drops masked text, and has the model know positions and timesteps of this rank's tokens.

    Args:
        transformer: its ``pos_embed`` is replaced.
        shards: of the forward in progress.
        forwards: of its blocks; undone with the rest.
    """

    def __init__(self, transformer: Model, shards: SequenceShards, forwards: BlockForwards) -> None:
        self.forwards = forwards
        self.time = ExactTime(transformer.time_text_embed, _embed_time)
        self.transformer, self.shards, self.original = transformer, shards, transformer.pos_embed
        self.rotary = transformer.pos_embed = RotaryPositions(transformer.config.axes_dims_rope)
        self._at_zero: bool = transformer.config.zero_cond_t
        self._placement: Placement | None = None
        self._text: tuple[int, ...] = ()
        self._mask: Tensor | None = None

    def prepare(self, arguments: dict[str, Any]) -> None:
        self.forwards.begin(arguments, self.transformer)
        self.time.begin(arguments)
        text, mask = arguments["encoder_hidden_states"], arguments.pop("encoder_hidden_states_mask", None)
        width = self.transformer.config.joint_attention_dim
        if text.shape[-1] != width:
            raise ValueError(
                f"the conditioning has {text.shape[-1]} features a token, this model takes {width}: it was made by the "
                "text encoder of another model"
            )
        kept = list(range(text.shape[1]))
        if mask is not None:
            mask = mask.bool().cpu()
            if mask.shape != text.shape[:2]:
                raise ValueError(f"a text mask of {list(mask.shape)} does not fit text of {list(text.shape[:2])}")
            # What no sample attends to is left out for good.
            kept = mask.any(dim=0).nonzero().flatten().tolist()
            if len(kept) < text.shape[1]:
                arguments["encoder_hidden_states"] = text[:, kept]
                mask = mask[:, kept]
        self._mask = None if mask is None or bool(mask.all()) else mask
        self._text = tuple(kept)
        placement = self._placement = self._place(arguments["img_shapes"])
        tokens = sum(prod((grid.frames, grid.rows, grid.columns)) for grid in placement.grids)
        if tokens != arguments["hidden_states"].shape[1]:
            raise ValueError(f"img_shapes make {tokens} tokens, but {arguments['hidden_states'].shape[1]} are given")

    def localize(self, arguments: dict[str, Any]) -> None:
        assert self._placement is not None
        placement, device = self._placement, arguments["hidden_states"].device
        self.rotary.place(placement, self._text, self.shards, device)
        if self._mask is not None:
            self.shards.hide_keys(0, self._mask, device)
        self._modulate_references(placement.references_at_zero)
        # The model reads off the shapes which tokens are the picture's and which are references'.
        picture = placement.grids[0]
        sizes, rank = self.shards.streams[1], self.shards.mesh.cp.rank
        first, last = sum(sizes[:rank]), sum(sizes[: rank + 1])
        border = min(max(picture.frames * picture.rows * picture.columns, first), last)
        shapes = [(1, 1, border - first), (1, 1, last - border)]
        arguments["img_shapes"] = [shapes] * arguments["hidden_states"].shape[0]

    def forget_graphs(self) -> None:
        self.forwards.forget_graphs()

    def remove(self) -> None:
        self.forwards.remove()
        self.time.remove()
        self.transformer.pos_embed = self.original
        self._modulate_references(self.transformer.config.zero_cond_t)

    def _place(self, shapes: Any) -> Placement:
        at_zero = self.transformer.config.zero_cond_t
        if isinstance(shapes, LatentImages):
            return shapes.place(at_zero)
        # As diffusers has it: images of each sample, or one image for all.
        first = shapes[0] if isinstance(shapes, list) else shapes
        if isinstance(shapes, list) and any(other != first for other in shapes):
            raise ValueError("pictures of a batch have different img_shapes; run them one by one")
        return placed_by_diffusers([tuple(image) for image in (first if isinstance(first, list) else [first])], at_zero)

    def _modulate_references(self, at_zero: bool) -> None:
        """Have the model take references as at timestep 0, or as the picture."""
        if at_zero != self._at_zero:
            for module in (self.transformer, *self.transformer.transformer_blocks):
                module.zero_cond_t = at_zero
            self._at_zero = at_zero


def _embed_time(module: Model, exact: Tensor, guidance: None, timestep: Tensor, *others: Any) -> Tensor:
    """`QwenTimestepProjEmbeddings` of exact timesteps; where there are twice as many, references' zeros follow."""
    if timestep.shape[0] > exact.shape[0]:
        exact = torch.cat([exact, exact * 0])
    return type(module).forward(module, exact, *others)
