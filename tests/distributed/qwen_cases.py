"""What the ranks of the test world run for Qwen-Image: against the untouched models of diffusers and transformers."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, VisionImage, family_of_transformer
from parallel_backend.mesh import SINGLE, ParallelMesh
from parallel_backend.parallelize import (
    disable_cache,
    parallelize_text_encoder,
    parallelize_transformer,
)
from tests.errors import relative_error

QWEN = family_of_transformer("QwenImageTransformer2DModel")
IMAGE_TOKEN = 90


def sharpen(model: torch.nn.Module) -> None:
    """Weights large enough that every block matters."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(parameter, 1.0, 0.1)


def tiny_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """Qwen-Image with 8 heads of 32 and 2 blocks."""
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        **{
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 8,
            "joint_attention_dim": 48,
            "axes_dims_rope": (4, 14, 14),
            **changes,
        }
    )
    sharpen(model)
    return model.eval()


def transformer_inputs(
    text: int, sizes: list[tuple[int, int]], batch: int, masked: list[list[int]] | None = None
) -> dict[str, Any]:
    """Arguments of diffusers' transformer for an image of so many tokens and references of the others.

    ``masked`` has, for each sample, the text tokens that are padding.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = sum(rows * columns for rows, columns in sizes)
    mask = None
    if masked is not None:
        mask = torch.ones(batch, text, dtype=torch.bool)
        for row, hidden in enumerate(masked):
            mask[row, hidden] = False
    return {
        "hidden_states": torch.randn(batch, tokens, 64, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 48, generator=generator),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.7),
        "img_shapes": [[(1, rows, columns) for rows, columns in sizes]] * batch,
    }


def transformer_errors(
    mesh: ParallelMesh, layout: ParallelismConfig, shapes: list[dict[str, Any]], **changes: Any
) -> list[float]:
    """Relative errors of the parallel transformer against the untouched one, for several `transformer_inputs`.

    One model computes them all, and the first again at the end: nothing may linger from one forward to the next.
    """
    model, inputs = tiny_transformer(**changes), [transformer_inputs(**shape) for shape in shapes]
    expected = [model(**one, return_dict=False)[0] for one in inputs]
    parallelize_transformer(model, QWEN.transformer, layout, mesh)
    again = zip([*inputs, inputs[0]], [*expected, expected[0]], strict=True)
    return [relative_error(model(**one).sample, wanted) for one, wanted in again]


def undone_error(mesh: ParallelMesh, layout: ParallelismConfig) -> float:
    """Relative error of a model that was parallel for a time; on each rank by itself."""
    model, inputs = tiny_transformer(zero_cond_t=True), transformer_inputs(5, [(4, 3), (2, 3)], 1)
    expected = model(**inputs, return_dict=False)[0]
    parallelize_transformer(model, QWEN.transformer, layout, mesh)
    method = Conditioning(torch.randn(1, 3, 48), [torch.randn(1, 16, 1, 4, 4)], options={"reference_method": "index"})
    model(**QWEN.transformer.inputs(torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), method), return_dict=False)
    disable_cache(model)
    return relative_error(model(**inputs).sample, expected)


def latent_errors(
    mesh: ParallelMesh, layout: ParallelismConfig, sizes: list[tuple[int, int]], batch: int
) -> dict[str, float]:
    """Relative error of a prediction for latents of these sizes against one rank's, by the reference method."""
    generator = torch.Generator().manual_seed(3)
    x, *references = (torch.randn(batch, 16, 1, h, w, generator=generator) for h, w in sizes)
    context = torch.randn(batch, 7, 48, generator=generator)
    whole, model = tiny_transformer(), tiny_transformer()
    parallelize_transformer(whole, QWEN.transformer, ParallelismConfig(), ParallelMesh(*[SINGLE] * 5, "cpu"))
    parallelize_transformer(model, QWEN.transformer, layout, mesh)
    errors = {}
    for method in QWEN.transformer.conditioning_options["reference_method"]:
        conditioning = Conditioning(context, references, options={"reference_method": method})
        inputs = QWEN.transformer.inputs(x, torch.full((batch,), 0.7), conditioning)
        expected, actual = (QWEN.transformer.prediction(m(**inputs, return_dict=False)[0], x) for m in (whole, model))
        assert expected.shape == x.shape
        errors[method] = relative_error(actual, expected)
    return errors


def modulation_gathers(mesh: ParallelMesh, layout: ParallelismConfig) -> int:
    """How many gathers over tp a forward makes."""
    model = tiny_transformer()
    parallelize_transformer(model, QWEN.transformer, layout, mesh)
    with patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
        model(**transformer_inputs(5, [(4, 4)], 1), return_dict=False)
    return gather.call_count


def tiny_text_encoder(heads: int, kv_heads: int) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with heads of 16, 3 layers, and a vision tower of 2 blocks of which one looks at all patches."""
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=100,
            hidden_size=16 * heads,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=16 * heads,
            window_size=56,
            fullatt_block_indexes=[1],
        ),
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=91,
        vision_end_token_id=92,
        video_token_id=93,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    sharpen(model)
    return model


def text_errors(mesh: ParallelMesh, layout: ParallelismConfig, heads: int, kv_heads: int) -> list[float]:
    """Relative errors of the context of the sharded text encoder against the untouched model's last hidden state.

    Of the same prompts without images, with images in the places of some tokens, and without again.
    """
    model = tiny_text_encoder(heads, kv_heads)
    generator = torch.Generator().manual_seed(2)
    plain = torch.randint(3, 80, (2, 30), generator=generator)
    mask = torch.ones_like(plain)
    mask[1, 26:] = 0
    illustrated, grids = plain.clone(), [(1, 4, 6), (1, 2, 4), (1, 6, 4)]
    given: list[VisionImage] = []
    for row, first, grid in zip((0, 0, 1), (2, 10, 4), grids, strict=True):
        illustrated[row, first : first + grid[1] * grid[2] // 4] = IMAGE_TOKEN
        given.append(VisionImage(torch.randn(grid[1] * grid[2], 1176, generator=generator), grid))
    images = {
        "pixel_values": torch.cat([image.patches for image in given]),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (illustrated == IMAGE_TOKEN).int(),
    }
    features = QWEN.needs_text_encoder().encode_images(model.model.visual, given)

    def untouched(ids: torch.Tensor, **others: Any) -> torch.Tensor:
        return model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **others
        ).hidden_states[-1]

    expected = [untouched(plain), untouched(illustrated, **images)]
    parallelize_text_encoder(model, QWEN.needs_text_encoder(), mesh, "text_encoder")
    text_model = QWEN.needs_text_encoder().text_model(model)
    text_model.image_token_id = IMAGE_TOKEN
    layers = QWEN.needs_text_encoder().layers(model.config.to_dict())
    actual = [
        QWEN.needs_text_encoder().encode(text_model, plain, mask, layers),
        QWEN.needs_text_encoder().encode(text_model, illustrated, mask, layers, features, grids),
        QWEN.needs_text_encoder().encode(text_model, plain, mask, layers),
    ]
    rows = mask.bool()
    return [relative_error(a[rows], e[rows]) for a, e in zip(actual, [*expected, expected[0]], strict=True)]
