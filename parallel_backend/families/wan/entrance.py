"""Wan's forward on a rank: latents become a shard of tokens, and the shards' tokens a prediction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ...blocks.embedding import KEPT, Rotary
from ...blocks.forwards import BlockForwards, refuse
from ...blocks.kept_keys import KeptKeys
from ...parallel.elementwise import Table, modulated_norm
from ...parallel.products import product_of
from ...parallel.sequence import Entrance, SequenceShards
from ...parallel.tensor import Model

MOST_ROWS = 2048
"""Tokens of conditionings whose keys and values are kept: four prompts of 512."""
THETA = 10000.0

Grid = tuple[int, int, int]
"""Tokens of a latent: frames, rows and columns."""


class WanEntrance(Entrance):
    """Cuts latents into tokens, of which a rank has its shard, and makes a prediction of the shards.

    The model's forward is replaced on the instance: its inputs have five dims, and become sequences within. What comes
    beside the latent (``references`` and ``first_frame`` in ``attention_kwargs``) is a second stream behind it.

    Args:
        transformer: the model.
        shards: of the forward in progress.
        forwards: of its blocks; undone with the rest.
    """

    def __init__(self, transformer: Model, shards: SequenceShards, forwards: BlockForwards) -> None:
        self.transformer, self.shards, self.forwards = transformer, shards, forwards
        self.keys = KeptKeys(MOST_ROWS)
        self._rotary: OrderedDict[Any, Rotary] = OrderedDict()
        transformer.forward = self._forward

    def prepare(self, arguments: dict[str, Any]) -> None:
        self.forwards.begin(arguments, self.transformer)
        beside = beside_of(arguments)
        size = self.transformer.config.patch_size
        tokens = prod(grid_of(arguments["hidden_states"], size))
        others = [grid_of(latent, size) for latent in beside_latents(beside)]
        self.shards.begin([tokens, sum(map(prod, others))] if others else [tokens])

    def localize(self, arguments: dict[str, Any]) -> None:
        local = self.shards.streams[0][self.shards.mesh.cp.rank]
        arguments["attention_kwargs"] = {**beside_of(arguments), "picture_tokens": local}

    def forget_graphs(self) -> None:
        self.forwards.forget_graphs()

    def forget_values(self) -> None:
        self.keys.forget()

    def remove(self) -> None:
        self.forwards.remove()
        self.keys.forget()
        del self.transformer.forward

    def _forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        model = self.transformer
        beside = dict(attention_kwargs or {})
        references, first, local = (beside.pop(name, None) for name in ("references", "first_frame", "picture_tokens"))
        refuse(**beside)
        x, size = hidden_states, model.config.patch_size
        grid = grid_of(x, size)
        tokens = self._embedded(model.patch_embedding, x, 0)
        latents = beside_latents({"references": references, "first_frame": first})
        if latents:
            tokens = torch.cat([tokens, self._beside(latents, first, grid, len(x))], dim=1)
        rotary = self._positions(grid, [grid_of(latent, size) for latent in latents], first is not None, x.device)
        keys = self.keys.begin((encoder_hidden_states, encoder_hidden_states_image), self._conditioning)
        temb, rows, picks = self._time(timestep, x.dtype, len(x), 0 if first is None else prod(grid[1:]))
        modulation = rows.unflatten(1, (6, -1)), picks
        for block in model.blocks:
            tokens = block(tokens, keys, modulation, rotary)
        values = model.scale_shift_table.float() + temb.float()[:, None]
        picks = None if picks is None else picks[:, :local]
        table = Table(values[:, 0], values[:, 1], values[:, 1], picks)
        patches = model.proj_out(modulated_norm(tokens[:, :local], table, model.norm_out.eps))
        sample = unpatched(self.shards.gather(patches, 0), grid, size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embedded(self, convolution: Model, latent: Tensor, stream: int) -> Tensor:
        """This rank's tokens ``[B, S_local, C]`` of a latent, by a convolution over patches, in fp32 as ComfyUI has it.

        What a stream has of several latents is cut later.
        """
        patches = patched(latent, self.transformer.config.patch_size)
        local = patches if stream else self.shards.shard(patches, 0, 1)
        bias = None if convolution.bias is None else convolution.bias.float()
        return F.linear(local.float(), convolution.weight.float().flatten(1), bias).to(latent.dtype)

    def _beside(self, latents: list[Tensor], first: Tensor | None, grid: Grid, batch: int) -> Tensor:
        """This rank's tokens of what comes beside the latent."""
        model, parts = self.transformer, []
        for latent in latents:
            embedder = model.patch_embedding
            if latent is first:
                embedder = model.ref_conv
                if grid_of(first, model.config.patch_size)[1:] != grid[1:]:
                    raise ValueError(
                        f"the reference image is {first.shape[-1]} x {first.shape[-2]} latent positions, the video has "
                        f"patches of {grid[2]} x {grid[1]}; they have to have the same size"
                    )
            parts.append(self._embedded(embedder, latent.expand(batch, -1, -1, -1, -1), 1))
        return self.shards.shard(torch.cat(parts, dim=1), 1, 1)

    def _conditioning(self, text: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the blocks attend to: ``[B, L, C]`` of the text and of the image."""
        embedder = self.transformer.condition_embedder
        if image is not None and embedder.image_embedder is not None:
            image = _image_tokens(embedder.image_embedder, image, len(text))
        elif image is not None:
            raise ValueError("this model takes no image tokens")
        return embedder.text_embedder(text), image

    def _time(
        self, timestep: Tensor, dtype: torch.dtype, batch: int, tokens_before: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the timesteps: their embedding and modulation ``[n * B, ...]``, and which of the n a token here takes.

        Args:
            timestep: ``[B]``; or ``[B, F]`` of frames, or ``[B, S]`` of tokens. Of those only distinct values become
                rows.
            dtype: of the tokens.
            batch: of the latents.
            tokens_before: that ComfyUI has before the latent's own, when it shares out timesteps of frames.
        """
        embedder, picks = self.transformer.condition_embedder, None
        values = timestep.expand(batch) if timestep.ndim < 2 else timestep
        if values.ndim == 2:
            values, index = torch.unique(timestep, return_inverse=True)
            picks = self._picks(index.expand(batch, -1), tokens_before)
        stored = product_of(embedder.time_embedder.linear_1).dtype
        exact = stored if stored.itemsize > 1 else dtype  # not that of weights in 8 bits
        temb = embedder.time_embedder(embedder.timesteps_proj(values).to(exact)).to(dtype)
        rows = embedder.time_proj(embedder.act_fn(temb))
        if picks is not None:
            temb, rows = (part.repeat_interleave(batch, dim=0) for part in (temb, rows))
        return temb, rows, picks

    def _picks(self, index: Tensor, before: int) -> Tensor:
        """Which timestep each of a rank's tokens takes, ``[B, S_local]``, where there are n for all ``[B, n]``."""
        lengths = [self.shards.length(stream) for stream in range(len(self.shards.streams))]
        frames, total = index.shape[1], sum(lengths)
        each = -(-total // frames)  # as ComfyUI, which does not know of frames that come before the latent's
        start = [before, 0] if before and len(lengths) > 1 else [0, lengths[0]]
        parts = []
        for stream, length in enumerate(lengths):
            places = torch.arange(start[stream], start[stream] + length, device=index.device)
            if stream and before:  # behind the first frame come references, which ComfyUI has behind the latent
                places = torch.where(places < before, places, places + lengths[0])
            parts.append(self.shards.shard(index[:, places // each], stream, 1))
        return torch.cat(parts, dim=1)

    def _positions(self, grid: Grid, others: list[Grid], first: bool, device: torch.device) -> Rotary:
        """Cosines and sines of this rank's tokens, kept from step to step."""
        key = grid, tuple(others), first, device
        if key not in self._rotary:
            dim = self.transformer.config.attention_head_dim
            angles = [self.shards.shard(_angles(grid, dim, device, start=int(first)), 0, 0)]
            if others:
                # ComfyUI turns what is no frame of the video by an angle more for each.
                beside = [_angles(one, dim, device, source=i + 1 - first) for i, one in enumerate(others)]
                angles.append(self.shards.shard(torch.cat(beside), 1, 0))
            pairs = torch.cat(angles).float().repeat_interleave(2, dim=-1)
            self._rotary[key] = pairs.cos(), pairs.sin()
        self._rotary.move_to_end(key)
        while len(self._rotary) > KEPT:
            self._rotary.popitem(last=False)
        return self._rotary[key]


def beside_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What comes beside the latent in the arguments of a forward."""
    return dict(arguments.get("attention_kwargs") or {})


def beside_latents(beside: Mapping[str, Any]) -> list[Tensor]:
    """The latents among it ``[B, C, F, h, w]``: a frame before the video, then references."""
    first = beside.get("first_frame")
    return [*([] if first is None else [first]), *(beside.get("references") or ())]


def grid_of(latent: Tensor, patch: Grid) -> Grid:
    """Tokens of a latent ``[B, C, F, h, w]``; ValueError where its sides are no multiples of a patch's."""
    sides = latent.shape[2:]
    if latent.ndim != 5 or any(side % size for side, size in zip(sides, patch, strict=True)):
        raise ValueError(f"a latent of {list(latent.shape)} cannot be cut into patches of {list(patch)}")
    frames, rows, columns = (side // size for side, size in zip(sides, patch, strict=True))
    return frames, rows, columns


def patched(latent: Tensor, patch: tuple[int, ...]) -> Tensor:
    """``[B, C, F, h, w] -> [B, S, C * prod(patch)]``, in the order of a convolution's weights."""
    for dim, size in zip((4, 3, 2), reversed(patch), strict=True):
        latent = latent.unflatten(dim, (-1, size))  # [B, C, f, 1, rows, 2, columns, 2] in the end
    return latent.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatched(tokens: Tensor, grid: Grid, patch: Grid) -> Tensor:
    """``[B, S, prod(patch) * C] -> [B, C, F, h, w]``; channels come last in a token."""
    parts = tokens.unflatten(2, (*patch, -1)).unflatten(1, grid)  # [B, f, rows, columns, 1, 2, 2, C]
    return parts.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _angles(grid: Grid, dim: int, device: torch.device, start: int = 0, source: int = 0) -> Tensor:
    """fp64 ``[S, D / 2]``, by which a head's pairs are turned: a third of them or so for each of frame, row, column.

    Args:
        grid: of the tokens.
        dim: features of a head.
        device: of the result.
        start: the first frame's number.
        source: which reference it is; 0: none.
    """
    third = 2 * (dim // 6)
    angles = []
    for axis, features in enumerate((dim - 2 * third, third, third)):
        numbers = torch.arange(grid[axis], device=device, dtype=torch.float64) + (start if axis == 0 else 0)
        shape = [1, 1, 1]
        shape[axis] = grid[axis]
        angles.append((numbers.view(*shape, 1) * _frequencies(features, device)).expand(*grid, -1))
    return torch.cat(angles, dim=-1).flatten(0, 2) + source * _frequencies(dim, device)


def _frequencies(features: int, device: torch.device) -> Tensor:
    return THETA ** -(torch.arange(0, features, 2, device=device, dtype=torch.float64) / features)


def _image_tokens(embedder: Model, image: Tensor, batch: int) -> Tensor:
    """The tokens ``[B, L, C]`` of images as CLIP sees them, of which diffusers has two in one batch."""
    places = embedder.pos_embed
    if places is not None:
        image = image.reshape(batch, -1, image.shape[-1]) if len(image) == 2 * batch else image
        image = image[:, : places.shape[1]] + places[:, : image.shape[1]].to(image.dtype)
    return embedder.norm2(embedder.ff(embedder.norm1(image)))
