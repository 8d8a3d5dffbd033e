"""FLUX.2 in ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.text_encoders.flux import Flux2TEModel, Flux2Tokenizer
from torch import Tensor

from ...parallel_backend.families import Conditioning
from ...parallel_backend.families.flux2.drawing import conversation
from ...parallel_backend.loading.checkpoint import Checkpoint
from ...parallel_backend.loading.pipeline_folder import PipelineFolder
from ...parallel_backend.loading.text_encoder_file import TextEncoderFile
from ...parallel_backend.requirements import installed
from ..comfy_chat import make_chat_clip
from ..comfy_clip import PromptOnly, RemoteEncoder, TextModelSpec, weight_shapes, wrap_clip
from ..comfy_patcher import RemotePart
from ..group import ModelHandle
from .base import ComfyFamily, Shapes, shapes_by_table

CLIP_NAME = "mistral3_24b"
"""What ComfyUI calls the language model of the text encoder."""


class Flux2(ComfyFamily):
    """See `ComfyFamily`."""

    name = "flux2"
    supported_class = comfy.supported_models.Flux2
    forward_arguments = ("y", "guidance", "ref_latents", "control", "transformer_options")
    patch_size = 1
    empty_latent = "EmptyFlux2LatentImage"
    clip_type = "flux2"

    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "image_model": "flux2",
            "in_channels": config["in_channels"],
            "out_channels": config.get("out_channels") or config["in_channels"],
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "num_heads": config["num_attention_heads"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "context_in_dim": config["joint_attention_dim"],
            "patch_size": 1,
            "axes_dim": list(config.get("axes_dims_rope", (32, 32, 32, 32))),
            "theta": config.get("rope_theta", 2000),
            "mlp_ratio": config.get("mlp_ratio", 3.0),
            "guidance_embed": config.get("guidance_embeds", True),
            # As detection says for each FLUX.2.
            "vec_in_dim": None,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
            "yak_mlp": False,
            "txt_norm": False,
        }

    def weight_shapes(self, source: Checkpoint, unet_config: dict[str, Any]) -> Shapes:
        return shapes_by_table(comfy.utils.flux_to_diffusers(unet_config), source, _RENAMES)

    def block_count(self, config: Mapping[str, Any]) -> int:
        return config["num_layers"] + config["num_single_layers"]

    def conditioning(
        self, x: Tensor, context: Tensor, given: dict[str, Any], config: Mapping[str, Any]
    ) -> Conditioning:
        given.pop("y", None)  # a pooled text, for which ComfyUI's FLUX.2 has no weights either
        if given.pop("attention_mask", None) is not None:
            raise ValueError(
                "the conditioning has an attention mask for parts of the image, which is not supported; bypass the "
                "node that sets it"
            )
        method = given.pop("ref_latents_method", None) or "index"
        if method != "index":
            raise ValueError(
                f"the reference latents ask for the method {method!r}; FLUX.2 in the parallel workers takes 'index' "
                "(bypass the node that chooses the method)"
            )
        guidance = given.pop("guidance", None)
        tensors = {} if guidance is None else {"guidance": guidance}
        return Conditioning(context, list(given.pop("ref_latents", None) or ()), tensors)

    def clip_of_file(self, handle: ModelHandle, source: TextEncoderFile) -> comfy.sd.CLIP:
        # As a tensor, which is how ComfyUI hands a file's tokenizer on.
        data = torch.frombuffer(bytearray(source.read_tokenizer()), dtype=torch.uint8)
        try:
            tokenizer = _Tokenizer(folder_paths.get_folder_paths("embeddings"), {"tekken_model": data})
        except (ValueError, LookupError, TypeError) as error:
            if "MistralConverter" in str(error):  # ComfyUI before 0.32 makes it with a class of transformers
                raise ValueError(
                    "this ComfyUI's own tokenizer of FLUX.2 does not work with transformers "
                    f"{installed('transformers')} ({error}); update ComfyUI to 0.32 or newer"
                ) from error
            raise ValueError(
                f"the tokenizer in {source.path} cannot be read ({error!r}); download the file again"
            ) from error
        spec = TextModelSpec(
            RemotePart(handle, "text_encoder"),
            count=source.text_config["text_config"]["num_hidden_layers"],
            shapes=weight_shapes(source),
            layer=list(source.family.needs_text_encoder().layers(source.text_config)),
            special_tokens={"start": 1, "pad": 0},
        )
        return wrap_clip(_TextEncoder(spec, CLIP_NAME), tokenizer)

    def clip_of_folder(self, handle: ModelHandle, source: PipelineFolder) -> comfy.sd.CLIP:
        return make_chat_clip(handle, source, conversation, CLIP_NAME)


class _Tokenizer(PromptOnly, Flux2Tokenizer):
    """ComfyUI's tokenizer of FLUX.2, which refuses what it would drop without a word."""


class _TextEncoder(RemoteEncoder, Flux2TEModel):
    """ComfyUI's text encoder of FLUX.2 with everything but the language model."""


_RENAMES = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}
