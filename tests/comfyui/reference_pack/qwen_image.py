"""ComfyUI's own Qwen-Image, small: its model, text encoder and VAE classes with the weights of a pipeline folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_detection
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.hunyuan_video import llama_detect
from comfy.text_encoders.llama import Llama2_, Qwen25_7BVLI, Qwen25_7BVLI_Config
from comfy.text_encoders.qwen_image import QwenImageTokenizer, te
from comfy.text_encoders.qwen_vl import Qwen2VLVisionTransformer

from .stock_model import StockLoader, stock_model
from .wan_names import to_wan_names

TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads")  # fmt: skip


def build_qwen_model(transformer: Any) -> comfy.model_patcher.ModelPatcher:
    """A stock MODEL (float32) with the weights of a diffusers QwenImageTransformer2DModel."""
    config = transformer.config
    weights = {name: tensor.float() for name, tensor in transformer.state_dict().items()}
    if config.zero_cond_t:
        weights["__index_timestep_zero__"] = torch.empty(0)
    unet_config = comfy.model_detection.detect_unet_config(weights, "")
    # Detection takes these for Qwen-Image's own.
    unet_config.update(
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=config.joint_attention_dim,
        axes_dims_rope=tuple(config.axes_dims_rope),
    )
    return stock_model(comfy.supported_models.QwenImage(unet_config), weights)


def load_qwen_file(path: str) -> comfy.model_patcher.ModelPatcher:
    """A stock MODEL (float32) of a file whose linears may be quantized; its rotary axes are of Qwen-Image's shares."""
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    unet_config = comfy.model_detection.detect_unet_config(weights, "")
    inner, _ = weights["img_in.weight"].shape
    (head,) = weights["transformer_blocks.0.attn.norm_q.weight"].shape
    unet_config.update(
        attention_head_dim=head,
        num_attention_heads=inner // head,
        joint_attention_dim=weights["txt_in.weight"].shape[1],
        axes_dims_rope=(head // 8, 7 * head // 16, 7 * head // 16),
    )
    return stock_model(comfy.supported_models.QwenImage(unet_config), weights)


class ReferenceQwenImage(StockLoader):
    read = staticmethod(load_qwen_file)


class _LanguageModel(Qwen25_7BVLI):
    """ComfyUI's Qwen2.5-VL with a vision tower of another size, which its constructor does not take."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        torch.nn.Module.__init__(self)
        vision = config_dict.pop("vision")
        config = Qwen25_7BVLI_Config(**config_dict)
        self.num_layers, self.dtype = config.num_hidden_layers, dtype
        self.model = Llama2_(config, device=device, dtype=dtype, ops=operations)
        self.visual = Qwen2VLVisionTransformer(
            output_hidden_size=config.hidden_size, device=device, dtype=dtype, ops=operations, **vision
        )


class _ClipModel(SDClipModel):
    """ComfyUI's handling of tokens for Qwen-Image, around `_LanguageModel`."""

    def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any]) -> None:
        super().__init__(
            device=device, dtype=dtype, layer="last", textmodel_json_config={}, special_tokens={"pad": 151643},
            layer_norm_hidden_state=False, model_class=_LanguageModel, enable_attention_masks=True,
            return_attention_masks=True, model_options=model_options,
        )  # fmt: skip


def build_qwen_clip(weights: dict[str, torch.Tensor], text: Any, vision: Any) -> comfy.sd.CLIP:
    """A stock CLIP of ComfyUI's own classes.

    Args:
        weights: of a Qwen2.5-VL, under ComfyUI's names; its linears may be quantized.
        text, vision: the parts of its transformers configuration.
    """
    config = {name: getattr(text, name) for name in TEXT_SIZES}
    config["vision"] = {name: getattr(vision, name) for name in ("hidden_size", "intermediate_size", "num_heads")}
    config["vision"]["num_layers"] = vision.depth
    found = llama_detect(weights)
    quantized = found.get("llama_quantization_metadata")
    return comfy.sd.CLIP(
        # Without a dtype it would hold the weights in fp16.
        SimpleNamespace(
            clip=te(found["dtype_llama"] if quantized else torch.float32, quantized),
            tokenizer=QwenImageTokenizer,
            params={},
        ),
        state_dict=[weights],
        model_options={"qwen25_7b_model_config": config, "qwen25_7b_class": _ClipModel},
    )


def build_qwen_vae(vae: Any) -> comfy.sd.VAE:
    """A stock VAE, all of it ComfyUI's own, with the weights of a diffusers AutoencoderKLQwenImage."""
    weights = vae.state_dict()
    names = to_wan_names(weights)
    built = comfy.sd.VAE({names[name]: tensor.float() for name, tensor in weights.items()}, dtype=torch.float32)
    assert set(built.first_stage_model.state_dict()) == set(names.values())
    return built


def load_qwen_pipeline(folder: Path) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a Qwen-Image pipeline folder."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig

    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    config = Qwen2_5_VLConfig.from_pretrained(folder / "text_encoder")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = comfy.utils.load_torch_file(str(file), safe_load=True)
    renamed = {re.sub(r"^model\.(language_model|visual)", _comfy_part, name): w for name, w in weights.items()}
    clip = build_qwen_clip(renamed, config.text_config, config.vision_config)
    return build_qwen_model(transformer), clip, build_qwen_vae(vae)


class ReferenceQwenClip:
    """Takes the place of Load CLIP in a graph; ``config`` is transformers' of the file's model."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip_name": ("STRING", {}), "config": ("STRING", {})}}

    def load(self, clip_name: str, config: str) -> tuple[Any]:
        from transformers import Qwen2_5_VLConfig

        path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
        made = Qwen2_5_VLConfig(**json.loads(config))
        weights = comfy.utils.load_torch_file(path, safe_load=True)
        return (build_qwen_clip(weights, made.text_config, made.vision_config),)


def _comfy_part(match: re.Match[str]) -> str:
    return {"language_model": "model", "visual": "visual"}[match[1]]
