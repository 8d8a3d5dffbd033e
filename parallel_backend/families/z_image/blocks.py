"""Z-Image's forward on a rank: its blocks over a shard of the sequence, and where the model enters and leaves it.

The model refines image and text by themselves, joins them, and runs its layers over both. A rank holds its shard of the
image's tokens, then its shard of the text's, from the embedding to the last linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from ...blocks.double_stream import Kept, clipped, head_norms, joined, row_output
from ...blocks.embedding import Rotary, rotary_of
from ...blocks.forwards import BlockForwards, refuse
from ...config import Speed
from ...parallel.attention import Lengths, ShardedAttention
from ...parallel.elementwise import HeadInputs
from ...parallel.sequence import Entrance, SequenceShards, split_sizes
from ...parallel.tensor import Model

PADDED_TO = 32
"""The model pads each stream to a multiple of this with a token of its own, which others attend to."""
PATCH = 2
"""Latent positions to a token, along each side."""


class LocalLatents(list[Tensor]):
    """The latents of a forward, and how many tokens of each a rank holds, padding not counted."""

    picture_tokens: int


class ZImageEntrance(Entrance):
    """Cuts each stream once it is embedded and padded, and gathers the image's tokens before they become a latent.

    Methods of the model are replaced on the instance: its forward takes lists of latents and prompts, which are no
    sequences yet.
    """

    def __init__(self, transformer: Model, attention: ShardedAttention, speed: Speed) -> None:
        self.transformer, self.joint = transformer, attention.shards
        mesh = self.joint.mesh
        self.image, self.text = SequenceShards(mesh), SequenceShards(mesh)
        without_graphs = replace(speed, cuda_graphs=False)
        kinds = (
            (attention, speed, transformer.layers),
            (ShardedAttention(self.image), without_graphs, transformer.noise_refiner),
            (ShardedAttention(self.text), without_graphs, transformer.context_refiner),
        )
        self.forwards = []
        for over, how, blocks in kinds:
            self.forwards.append(BlockForwards(over, how, (blocks,)))
            self.forwards[-1].replace(blocks, 1, _block, _forward)
        self.forward, self.unpatchify = transformer.forward, transformer.unpatchify
        self.replaced = {
            "forward": self._forward,
            "unpatchify": self._unpatchify,
            "_prepare_sequence": self._embedded,
            "_build_unified_sequence": self._unified,
        }
        for name, method in self.replaced.items():
            setattr(transformer, name, method)

    def localize(self, arguments: dict[str, Any]) -> None:
        latents = LocalLatents(arguments["x"])
        image, rank = tokens_of(latents[0]), self.joint.mesh.cp.rank
        sizes = split_sizes(_padded(image), self.joint.mesh.cp.degree)
        latents.picture_tokens = max(0, min(image - sum(sizes[:rank]), sizes[rank]))
        arguments["x"] = latents

    def forget_graphs(self) -> None:
        for forwards in self.forwards:
            forwards.forget_graphs()

    def remove(self) -> None:
        for forwards in self.forwards:
            forwards.remove()
        for name in self.replaced:
            delattr(self.transformer, name)

    def _forward(
        self, x: Sequence[Tensor], t: Tensor, cap_feats: Sequence[Tensor], return_dict: bool = True, **others: Any
    ) -> Any:
        """The model's own, of what has the same positions: prompts and latents of one batch may differ in size."""
        patches = others.pop("patch_size", PATCH), others.pop("f_patch_size", 1)
        refuse(**others)
        if patches != (PATCH, 1) or isinstance(x[0], list):
            raise ValueError("under parallelism Z-Image takes single pictures in patches of 2 x 2 (not Omni's lists)")
        groups: dict[tuple[torch.Size, int], list[int]] = {}
        for index, (latent, tokens) in enumerate(zip(x, cap_feats, strict=True)):
            groups.setdefault((latent.shape, len(tokens)), []).append(index)
        if len(groups) > 1 and getattr(self.transformer.layers, "is_cached", False):
            raise ValueError(
                f"the block cache takes a batch of prompts and latents of one size, this one has {len(groups)}; call "
                "the model with one after the other"
            )
        out: list[Any] = [None] * len(x)
        for (_, text), members in groups.items():
            lengths = _padded(tokens_of(x[members[0]])), _padded(text)
            self.joint.begin(lengths)
            self.image.begin(lengths[:1])
            self.text.begin((0, lengths[1]))  # the second stream, whose shards are those that it has in the joint one
            self.forwards[0].begin({}, self.transformer)
            together = getattr(self.transformer.layers[0].adaLN_modulation[0], "together", None)
            if together is not None:
                together.begin()  # what is there is of another group's timesteps
            chosen = [[values[i] for i in members] for values in (x, cap_feats)]
            (part,) = self.forward(chosen[0], t[members], chosen[1], return_dict=False)
            for index, sample in zip(members, part, strict=True):
                out[index] = sample
        if not return_dict:
            return (out,)
        return Transformer2DModelOutput(sample=out)

    def _embedded(
        self, feats: list[Tensor], pos_ids: list[Tensor], is_padding: list[Tensor], pad_token: Tensor, *_: Any
    ) -> tuple[Tensor, Rotary, None, list[int], None]:
        """A stream's shard ``[B, S_local, C]`` with padding where it belongs, and the rotary embedding of its tokens.

        All samples of a forward have the same positions.
        """
        is_text = pad_token is self.transformer.cap_pad_token
        shards, stream = (self.text, 1) if is_text else (self.image, 0)
        whole = torch.where(torch.stack(is_padding)[..., None], pad_token, torch.stack(feats))
        positions = shards.shard(pos_ids[0], stream, 0)
        rotary = rotary_of(positions, self.transformer.axes_dims, self.transformer.rope_theta)
        return shards.shard(whole, stream, 1), rotary, None, [len(part) for part in feats], None

    def _unified(self, x: Tensor, x_freqs: Rotary, *rest: Any, **_: Any) -> tuple[Tensor, Rotary, None, None]:
        """Both streams' shards as one sequence."""
        text, text_rotary = rest[2], rest[3]
        cos, sin = (torch.cat(pair) for pair in zip(x_freqs, text_rotary, strict=True))
        return torch.cat([x, text], dim=1), (cos, sin), None, None

    def _unpatchify(self, x: list[Tensor], *sizes: Any, **others: Any) -> list[Tensor]:
        local = torch.stack(x)[:, : self.image.tokens(self.joint.mesh.cp.rank)]
        return self.unpatchify(list(self.image.gather(local, 0)), *sizes, **others)


def tokens_of(latent: Tensor) -> int:
    """Tokens of a latent ``[C, F, H, W]`` without padding."""
    return latent.shape[-2] // PATCH * (latent.shape[-1] // PATCH)


def _padded(tokens: int) -> int:
    return -(-tokens // PADDED_TO) * PADDED_TO


def _forward(
    run: Any, block: Model, x: Tensor, attn_mask: None, freqs_cis: Rotary, adaln_input: Tensor | None = None,
    noise_mask: None = None, adaln_noisy: None = None, adaln_clean: None = None,
) -> Tensor:  # fmt: skip
    refuse(attn_mask=attn_mask, noise_mask=noise_mask, adaln_noisy=adaln_noisy, adaln_clean=adaln_clean)
    return run(block, x, block.adaLN_modulation(adaln_input) if block.modulation else None, *freqs_cis)


def _block(
    block: Model,
    attention: ShardedAttention,
    x: Tensor,  # [B, S_local, C]
    modulation: Tensor | None,  # [B, 4 C]: scale and gate around attention, and around the MLP
    cos: Tensor,
    sin: Tensor,
    lengths: Lengths,
    kept: Kept,
) -> Tensor:
    scales: list[Tensor | None] = [None, None]
    gates: list[Tensor | None] = [None, None]
    if modulation is not None:
        values = modulation.unsqueeze(1).chunk(4, dim=2)
        scales, gates = [1 + values[0], 1 + values[2]], [values[1].tanh(), values[3].tanh()]
    attn, mlp = block.attention, block.feed_forward
    normed = _normed(block.attention_norm1, x, scales[0])
    norms = head_norms(attn.norm_q, attn.norm_k, x.dtype)
    packed = attention.pack([HeadInputs(attn.to_q(normed), attn.to_k(normed), attn.to_v(normed), *norms)], cos, sin)
    begun = [attention.begin(packed, lengths)]
    del packed, normed
    out = attention.collect(attention.attend(begun.pop(), lengths, kept))
    out = clipped(joined(row_output(attn.to_out[0], out, True)))
    x = x + _normed(block.attention_norm2, out, gates[0])
    normed = _normed(block.ffn_norm1, x, scales[1])
    middle = clipped(F.silu(mlp.w1(normed)) * mlp.w3(normed))
    out = clipped(joined(row_output(mlp.w2, middle, True)))
    return clipped(x + _normed(block.ffn_norm2, out, gates[1]))


def _normed(norm: Model, x: Tensor, factor: Tensor | None) -> Tensor:
    normed = F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)
    return normed if factor is None else normed * factor
