"""What the ranks of the test world run: a parallel model against the untouched one of diffusers or transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from diffusers import Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from parallel_backend.blocks import double_stream as blocks
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, family_of_transformer
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallel import long_mlp
from parallel_backend.parallelize import parallelize_text_encoder, parallelize_transformer
from tests.errors import relative_error

FLUX2 = family_of_transformer("Flux2Transformer2DModel")


def in_pieces(case: Callable[..., Any]) -> Callable[..., Any]:
    """A case that computes MLPs of twice as many tokens as ``piece``, an argument by name, in pieces of them."""

    @functools.wraps(case)
    def run(*args: Any, piece: int = long_mlp.PIECE, **kwargs: Any) -> Any:
        with patch.object(long_mlp, "PIECE", piece):
            return case(*args, **kwargs)

    return run


def tiny_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """FLUX.2 with 8 heads of 16, 2 double and 2 single blocks, weights large enough that every block matters."""
    config = dict(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=8,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        mlp_ratio=3.0,
        axes_dims_rope=(4, 4, 4, 4),
    )
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(**{**config, **changes})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model.eval()


def flux2_inputs(text: int, sizes: list[tuple[int, int]], batch: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of the transformer for ``text`` tokens, an image of the first size and references of the others."""
    generator = torch.Generator().manual_seed(seed)
    x, *references = (torch.randn(batch, 128, h, w, generator=generator) for h, w in sizes)
    context = torch.randn(batch, text, 48, generator=generator)
    timestep = torch.full((batch,), 0.7)
    conditioning = Conditioning(context, references, {"guidance": torch.full((batch,), 3.5)})
    return FLUX2.transformer.inputs(x, timestep, conditioning)


@in_pieces
def transformer_errors(
    mesh: ParallelMesh, layout: ParallelismConfig, shapes: list[tuple[int, list[tuple[int, int]], int]], **changes: Any
) -> list[float]:
    """Relative errors of the parallel transformer against the untouched one, for inputs of several shapes.

    One model computes them all, and the first again at the end: nothing may linger from one forward to the next.
    """
    model, inputs = tiny_transformer(**changes), [flux2_inputs(*shape) for shape in shapes]
    expected = [model(**one, return_dict=False)[0] for one in inputs]
    blocks.TILE = 2  # row-parallel outputs come in two pieces
    parallelize_transformer(model, FLUX2.transformer, layout, mesh)
    again = zip([*inputs, inputs[0]], [*expected, expected[0]], strict=True)
    return [relative_error(model(**one).sample, wanted) for one, wanted in again]


def tiny_text_encoder(kv_heads: int, layers: int = 4) -> Mistral3ForConditionalGeneration:
    """Mistral3 with 8 heads of 16 and a vision tower as small as it can be."""
    text = dict(
        model_type="mistral",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=16,
        vocab_size=100,
        sliding_window=None,
    )
    vision = dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    torch.manual_seed(0)
    model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    return model


def text_ids(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask that hides a different number of tokens on the left of each prompt."""
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids, mask


def text_encoder_error(mesh: ParallelMesh, layout: ParallelismConfig, kv_heads: int, batch: int, length: int) -> float:
    """Largest relative error of any hidden state of the sharded text encoder against the untouched one."""
    model = tiny_text_encoder(kv_heads)
    ids, mask = text_ids(batch, length)
    expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    parallelize_text_encoder(model, FLUX2.needs_text_encoder(), mesh, "text_encoder")
    actual = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    errors = [
        relative_error(a[mask.bool()], e[mask.bool()])
        for a, e in zip(actual.hidden_states, expected.hidden_states, strict=True)
    ]
    return max([*errors, relative_error(actual.logits, expected.logits)])
