"""Wan in ComfyUI: its transformers, and umT5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_detection
import comfy.sd
import folder_paths
import torch
from comfy.text_encoders.wan import WanT5Model, WanT5Tokenizer
from torch import Tensor

from ...parallel_backend.families import Conditioning
from ...parallel_backend.loading.checkpoint import Checkpoint
from ...parallel_backend.loading.text_encoder_file import TextEncoderFile
from ..comfy_clip import PromptOnly, RemoteEncoder, TextModelSpec, weight_shapes, wrap_clip
from ..comfy_patcher import RemotePart
from ..group import ModelHandle
from .base import ComfyFamily, Shapes

FIRST_FRAME = "first_frame_channels"


class Wan(ComfyFamily):
    """See `ComfyFamily`."""

    name = "wan"
    forward_arguments = ("clip_fea", "time_dim_concat", "transformer_options")
    patch_size = (1, 2, 2)
    empty_latent = "EmptyHunyuanLatentVideo (Wan22ImageToVideoLatent for the 5B model)"
    clip_type = "wan"

    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            "image_model": "wan2.1",
            "model_type": "t2v" if config.get("image_dim") is None else "i2v",
            "dim": config["num_attention_heads"] * config["attention_head_dim"],
            "in_dim": config["in_channels"],
            "out_dim": config["out_channels"],
            "num_heads": config["num_attention_heads"],
            "ffn_dim": config["ffn_dim"],
            "num_layers": config["num_layers"],
            "text_dim": config["text_dim"],
            "freq_dim": config["freq_dim"],
            "patch_size": (1, 2, 2),
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
        }
        if config.get("pos_embed_seq_len") is not None:
            found["flf_pos_embed_token_number"] = config["pos_embed_seq_len"]
        if config.get(FIRST_FRAME) is not None:
            found["in_dim_ref_conv"] = config[FIRST_FRAME]
        return found

    def supported(self, unet_config: dict[str, Any]) -> Any:
        found = comfy.model_detection.model_config_from_unet_config(unet_config)
        if found is None:
            raise ValueError(
                f"this ComfyUI knows no Wan {unet_config['model_type']} of {unet_config['in_dim']} input channels; "
                "update ComfyUI, or take one of the files that its templates name"
            )
        return found

    def weight_shapes(self, source: Checkpoint, unet_config: dict[str, Any]) -> Shapes:
        kind = source.family.transformer
        model = kind.build(source.transformer_config)
        return {kind.file_rows(name)[0][0]: tuple(one.shape) for name, one in model.named_parameters()}

    def block_count(self, config: Mapping[str, Any]) -> int:
        return config["num_layers"]

    def conditioning(
        self, x: Tensor, context: Tensor, given: dict[str, Any], config: Mapping[str, Any]
    ) -> Conditioning:
        given.pop("denoise_mask", None)  # it is in the timesteps of the frames
        # As ComfyUI's own model, which has no weights for an image, or for a reference, in most kinds.
        image, first = given.pop("clip_fea", None), given.pop("reference_latent", None)
        tensors = {
            "concat": given.pop("concat", None),
            "image": None if config.get("image_dim") is None else image,
            "first_frame": None if config.get(FIRST_FRAME) is None or first is None else first.unsqueeze(2),
            "more_frames": given.pop("time_dim_concat", None),
        }
        more = tensors["more_frames"]
        if more is not None and (tensors["concat"] is not None or more.shape[1] != x.shape[1]):
            raise ValueError(
                f"the conditioning has frames of {more.shape[1]} channels to go behind the video (as of Phantom), "
                f"which a model of {config['in_channels']} input channels does not take; use Wan T2V"
            )
        references = list(given.pop("context_latents", None) or ())
        return Conditioning(context, references, {name: one for name, one in tensors.items() if one is not None})

    def clip_of_file(self, handle: ModelHandle, source: TextEncoderFile) -> comfy.sd.CLIP:
        # As a tensor, which is how ComfyUI hands a file's tokenizer on.
        data = torch.frombuffer(bytearray(source.read_tokenizer()), dtype=torch.uint8)
        try:
            tokenizer = _Tokenizer(folder_paths.get_folder_paths("embeddings"), {"spiece_model": data})
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"the tokenizer in {source.path} cannot be read ({error!r}); download the file again"
            ) from error
        spec = TextModelSpec(
            RemotePart(handle, "text_encoder"),
            count=source.text_config["num_layers"],
            shapes=weight_shapes(source),
            layer="last",
            special_tokens={"end": 1, "pad": 0},
            gives_mask=False,
        )
        return wrap_clip(_TextEncoder(spec, "umt5xxl"), tokenizer)


class _Tokenizer(PromptOnly, WanT5Tokenizer):
    """ComfyUI's tokenizer of umT5, which refuses what it would drop without a word."""


class _TextEncoder(RemoteEncoder, WanT5Model):
    """ComfyUI's text encoder of Wan with everything but umT5 itself."""
