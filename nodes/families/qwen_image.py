"""Qwen-Image in ComfyUI: text to image, and the Edit models, whose text encoder looks at the pictures too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models
import torch
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders.qwen_image import QwenImageTEModel, QwenImageTokenizer
from torch import Tensor
from transformers import Qwen2Tokenizer

from ...parallel_backend.families import Conditioning
from ...parallel_backend.loading.checkpoint import Checkpoint
from ...parallel_backend.loading.pipeline_folder import PipelineFolder
from ...parallel_backend.loading.text_encoder_file import TextEncoderFile
from ..comfy_clip import PromptOnly, RemoteEncoder, TextModelSpec, weight_shapes, wrap_clip
from ..comfy_patcher import RemotePart
from ..group import ModelHandle
from .base import ComfyFamily, Shapes

CLIP_NAME = "qwen25_7b"
"""What ComfyUI's tokenizer and text encoder call the language model."""
IMAGE_TOKEN, PAD_TOKEN = 151655, 151643
REFERENCE_METHODS = ("index", "index_timestep_zero", "negative_index")
"""Those that ComfyUI's Qwen-Image knows by name; for any other it puts references beside each other."""
HIDDEN = -1e4
"""A number that is added to an attention score and is at most this hides the token."""


class QwenImage(ComfyFamily):
    """See `ComfyFamily`."""

    name = "qwen_image"
    supported_class = comfy.supported_models.QwenImage
    forward_arguments = ("attention_mask", "ref_latents", "additional_t_cond", "transformer_options")
    patch_size = 2
    empty_latent = "EmptySD3LatentImage"
    clip_type = "qwen_image"

    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "image_model": "qwen_image",
            "in_channels": config["in_channels"],
            "num_layers": config["num_layers"],
        }

    def weight_shapes(self, source: Checkpoint, unet_config: dict[str, Any]) -> Shapes:
        # ComfyUI's names are diffusers'.
        model = source.family.transformer.build(source.transformer_config)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def block_count(self, config: Mapping[str, Any]) -> int:
        return config["num_layers"]

    def conditioning(
        self, x: Tensor, context: Tensor, given: dict[str, Any], config: Mapping[str, Any]
    ) -> Conditioning:
        references = list(given.pop("ref_latents", None) or ())
        tensors, options = {}, {}
        mask = given.pop("attention_mask", None)
        if mask is not None and not (kept := token_mask(mask, context)).all():
            tensors["mask"] = kept
        method = given.pop("ref_latents_method", None)
        if method is not None:
            options["reference_method"] = method if method in REFERENCE_METHODS else "offset"
        return Conditioning(context, references, tensors, options)

    def clip_of_file(self, handle: ModelHandle, source: TextEncoderFile) -> comfy.sd.CLIP:
        return _make_clip(handle, source, _Tokenizer())

    def clip_of_folder(self, handle: ModelHandle, source: PipelineFolder) -> comfy.sd.CLIP:
        def folder_tokenizer(tokenizer_data: dict[str, Any], **_: Any) -> SDTokenizer:
            return _language_tokenizer(source.path / "tokenizer", tokenizer_data)

        return _make_clip(handle, source, _Tokenizer(tokenizer_data={f"{CLIP_NAME}_tokenizer_class": folder_tokenizer}))


def token_mask(mask: Tensor, context: Tensor) -> Tensor:
    """int64 ``[B, L]``, 1 where there is a token, from either kind of attention mask that ComfyUI's Qwen-Image takes.

    Args:
        mask: 1 and 0 as integers, or what is added to attention scores as floats; ``[B, L]`` or ``[B, 1, L]``.
        context: ``[B, L, C]``.

    Raises:
        ValueError: the mask has another size, or hides tokens in part.
    """
    batch, length = context.shape[:2]
    if mask.shape[-1] != length or mask.numel() not in (length, batch * length):
        raise ValueError(
            f"the attention mask has shape {list(mask.shape)}, but the context is {batch} x {length} tokens; encode "
            "the prompt again, and bypass nodes that change its mask"
        )
    mask = mask.reshape(-1, length).expand(batch, length)
    if mask.is_floating_point():
        kept, hidden = mask == 0, mask <= HIDDEN
    else:
        kept, hidden = mask == 1, mask == 0
    if not (kept | hidden).all():
        strange = mask[~(kept | hidden)][0].item()
        raise ValueError(
            f"the attention mask weighs tokens (with {strange:g}), the parallel workers can only keep or hide them; "
            "bypass the node that sets it"
        )
    return kept.to(torch.int64)


class _Tokenizer(PromptOnly, QwenImageTokenizer):
    """ComfyUI's tokenizer of Qwen-Image, which refuses what it would drop without a word."""

    accepted_media = ("images",)


class _TextEncoder(RemoteEncoder, QwenImageTEModel):
    """ComfyUI's text encoder of Qwen-Image with everything but the language model."""


def _language_tokenizer(folder: Path, tokenizer_data: dict[str, Any]) -> SDTokenizer:
    """ComfyUI's handling of a pipeline's own tokenizer.

    Raises:
        ValueError: its files are missing or damaged, or it is not Qwen2.5's.
    """
    try:
        made = SDTokenizer(
            str(folder), max_length=99999999, min_length=1, pad_with_end=False, pad_to_max_length=False,
            pad_token=PAD_TOKEN, has_start_token=False, has_end_token=False, embedding_size=3584,
            embedding_key=CLIP_NAME, tokenizer_class=Qwen2Tokenizer, tokenizer_data=tokenizer_data,
        )  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error!r}); download the folder again") from error
    # By these numbers ComfyUI finds where the template ends and where an image goes.
    for token, number in {"<|im_start|>": 151644, "<|image_pad|>": IMAGE_TOKEN}.items():
        found = made.tokenizer.convert_tokens_to_ids(token)
        if found != number:
            raise ValueError(f"the tokenizer in {folder} has {token} as {found} where Qwen2.5's has {number}")
    return made


def _make_clip(handle: ModelHandle, source: TextEncoderFile | PipelineFolder, tokenizer: _Tokenizer) -> comfy.sd.CLIP:
    text = source.text_config.get("text_config", source.text_config)
    spec = TextModelSpec(
        RemotePart(handle, "text_encoder"),
        count=text["num_hidden_layers"],
        shapes=weight_shapes(source),
        layer="last",
        special_tokens={"pad": PAD_TOKEN},
        image_token=IMAGE_TOKEN,
    )
    return wrap_clip(_TextEncoder(spec, CLIP_NAME), tokenizer)
