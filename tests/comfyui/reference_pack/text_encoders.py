"""ComfyUI's own text encoders from small files; its loader knows files of the real size only."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.text_encoders.z_image
import comfy.utils
import folder_paths
from comfy.text_encoders import wan
from comfy.text_encoders.flux import Flux2Tokenizer, KleinTokenizer, flux2_te, klein_te
from comfy.text_encoders.hunyuan_video import llama_detect
from comfy.text_encoders.sd3_clip import t5_xxl_detect


def _load(clip_name: str, type: str, config: str) -> comfy.sd.CLIP:
    """The CLIP of a file: Mistral 3 or umT5 where it has their tokenizer, else Qwen3 of a type of Load CLIP's."""
    path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
    weights, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    weights, metadata = comfy.utils.convert_old_quants(weights, model_prefix="", metadata=metadata)
    found, data, name = llama_detect(weights), {}, "qwen3_4b"
    if "tekken_model" in weights:
        pruned = "model.layers.39.mlp.up_proj.weight" not in weights
        name, data = "mistral3_24b", {"tekken_model": weights["tekken_model"]}
        encoder, tokenizer = flux2_te(**found, pruned=pruned), Flux2Tokenizer
    elif "spiece_model" in weights:
        name, data = "umt5xxl", {"spiece_model": weights["spiece_model"]}
        encoder, tokenizer = wan.te(**t5_xxl_detect(weights)), wan.WanT5Tokenizer
    elif type == "flux2":
        encoder, tokenizer = klein_te(**found, model_type=name), KleinTokenizer
    else:
        encoder, tokenizer = comfy.text_encoders.z_image.te(**found), comfy.text_encoders.z_image.ZImageTokenizer
    return comfy.sd.CLIP(
        SimpleNamespace(clip=encoder, tokenizer=tokenizer, params={}),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=data,
        state_dict=[weights],
        model_options={f"{name}_model_config": json.loads(config)},
    )


class ReferenceTextEncoder:
    """Takes the place of Load CLIP in a graph, whose ``type`` it has; ``config`` has the sizes that no shape tells."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"clip_name": ("STRING", {}), "config": ("STRING", {})},
            "optional": {"type": ("STRING", {"default": "flux2"})},
        }

    def load(self, clip_name: str, config: str, type: str = "flux2") -> tuple[Any]:
        return (_load(clip_name, type, config),)


class ReferenceTokenizerOption:
    """A CLIP that pads short prompts, as nodes with tokenizer options ask for."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "set_option"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "name": ("STRING", {}), "value": ("INT", {})}}

    def set_option(self, clip: Any, name: str, value: int) -> tuple[Any]:
        clip = clip.clone()
        clip.set_tokenizer_option(name, value)
        return (clip,)
