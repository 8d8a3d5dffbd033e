"""The oracle of the server tests: a pipeline folder as stock MODEL, CLIP and VAE, with no code of the pack under test.

MODEL is ComfyUI's own Flux2 in ComfyUI's own process. CLIP and VAE run the untouched transformers and diffusers models
there. Of Qwen-Image all three are ComfyUI's own. All compute in float32.
``build_model``, ``build_clip`` and ``ReferenceVAE`` serve library-mode tests as well.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file

from .conditioning import (
    ReferenceConditioning,
    ReferenceRandomClip,
    ReferenceText,
    ReferenceVideoLatent,
    ReferenceVideoVae,
    ReferenceVision,
)
from .probes import ReferenceChange, ReferenceControl, ReferenceLook, ReferenceLoraModel, ReferenceStandIn
from .qwen_image import ReferenceQwenClip, ReferenceQwenImage, load_qwen_pipeline
from .stock_model import stock_model
from .text_encoders import ReferenceTextEncoder, ReferenceTokenizerOption
from .vaes import ReferenceClip, ReferenceNoText, ReferenceSaveTensor, ReferenceWanVAE
from .z_image import ReferenceZImage

DEFAULT_OUT_LAYERS = (10, 20, 30)

_RENAMES = {
    "time_guidance_embed.timestep_embedder.linear_1.weight": "time_in.in_layer.weight",
    "time_guidance_embed.timestep_embedder.linear_2.weight": "time_in.out_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight": "guidance_in.in_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_2.weight": "guidance_in.out_layer.weight",
    "double_stream_modulation_img.linear.weight": "double_stream_modulation_img.lin.weight",
    "double_stream_modulation_txt.linear.weight": "double_stream_modulation_txt.lin.weight",
    "single_stream_modulation.linear.weight": "single_stream_modulation.lin.weight",
}
"""FLUX.2's weights that ComfyUI's own table (comfy.utils.flux_to_diffusers) does not know."""


def to_comfy_state_dict(state_dict: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """The weights of a diffusers Flux2Transformer2DModel under ComfyUI's names, q, k and v fused.

    Args:
        state_dict: all weights of the diffusers model.
        config: its config.
    """
    table = comfy.utils.flux_to_diffusers({
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
    })  # fmt: skip
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, weight in state_dict.items():
        target = _RENAMES.get(name) or table[name]
        if isinstance(target, str):
            out[target] = weight
        elif len(target) == 3:
            # (name, None, swap_scale_shift)
            out[target[0]] = target[2](weight)
        else:
            fused, (_, start, _) = target
            parts.setdefault(fused, {})[start] = weight
    for fused, pieces in parts.items():
        out[fused] = torch.cat([pieces[start] for start in sorted(pieces)])
    return out


def build_model(transformer: Any) -> comfy.model_patcher.ModelPatcher:
    """A stock MODEL (ComfyUI's Flux2, float32) with the weights of a diffusers Flux2Transformer2DModel."""
    config = transformer.config
    weights = to_comfy_state_dict({k: v.float() for k, v in transformer.state_dict().items()}, config)
    unet_config = comfy.model_detection.detect_unet_config(weights, "")
    # Detection derives these from FLUX.2-dev's head size; a small model has other ones.
    unet_config.update(
        axes_dim=list(config.axes_dims_rope),
        num_heads=config.num_attention_heads,
        mlp_ratio=config.mlp_ratio,
        theta=config.rope_theta,
    )
    return stock_model(comfy.supported_models.Flux2(unet_config), weights)


class _ChatTokenizer:
    """What comfy.sd.CLIP asks of a tokenizer: text -> the token ids of the whole conversation, unpadded."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        ids = self.tokenizer.apply_chat_template(
            format_input(prompts=[text])[0], tokenize=True, add_generation_prompt=False, return_dict=True
        )["input_ids"]
        return {"mistral": [[(token, 1.0) for token in ids]]}


class _TextEncoder(torch.nn.Module):
    """What comfy.sd.CLIP asks of a text encoder, around an untouched Mistral3ForConditionalGeneration."""

    def __init__(self, model: torch.nn.Module, out_layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.out_layers = out_layers
        self.dtypes = {torch.float32}

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict[str, Any]) -> None:
        pass

    @torch.no_grad()
    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, None]:
        """``{"mistral": [[(id, weight)...]]}`` -> (cond [1, L, 3 * hidden], no pooled output)."""
        ids = torch.tensor([[token for token, _ in tokens["mistral"][0]]], device=self.model.device)
        states = self.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
        ).hidden_states
        cond = torch.cat([states[layer] for layer in self.out_layers], dim=-1)
        return cond.to(comfy.model_management.intermediate_device(), torch.float32), None


def build_clip(text_encoder: Any, tokenizer: Any) -> comfy.sd.CLIP:
    """A stock CLIP that runs ``text_encoder`` in float32 and gives the hidden states that FLUX.2 uses."""
    layers = tuple(getattr(text_encoder.config, "text_encoder_out_layers", None) or DEFAULT_OUT_LAYERS)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = _TextEncoder(text_encoder.float().eval(), layers)
    clip.tokenizer = _ChatTokenizer(tokenizer)
    clip.patcher = comfy.model_patcher.ModelPatcher(
        clip.cond_stage_model,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.patcher.is_clip = True
    clip.apply_hooks_to_conds = None
    clip.layer_idx = None
    clip.use_clip_schedule = False
    clip.tokenizer_options = {}
    return clip


class ReferenceVAE:
    """What VAEDecode and VAEEncode (also tiled, which is not tiled here) ask of a VAE, around AutoencoderKLFlux2.

    Latents are FLUX.2's: [B, 128, H/16, W/16], patchified and normalized by the VAE's batch norm statistics.
    """

    latent_channels = 128
    latent_dim = 2

    def __init__(self, vae: Any) -> None:
        self.device = comfy.model_management.vae_device()
        self.vae = vae.float().eval().to(self.device)

    def _mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        bn = self.vae.bn
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps)
        return bn.running_mean.view(1, -1, 1, 1), std

    @torch.no_grad()
    def decode(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        """[B, 128, h, w] -> IMAGE [B, 16 h, 16 w, 3] in 0..1."""
        from diffusers import Flux2Pipeline

        mean, std = self._mean_and_std()
        latents = Flux2Pipeline._unpatchify_latents(samples.to(self.device, torch.float32) * std + mean)
        picture = self.vae.decode(latents, return_dict=False)[0]
        picture = (picture / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        return picture.to(comfy.model_management.intermediate_device())

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        """IMAGE [B, H, W, 3] in 0..1 -> [B, 128, H/16, W/16]; other sizes are cropped as ComfyUI's VAE crops."""
        from diffusers import Flux2Pipeline

        for dim in (1, 2):
            size = pixels.shape[dim] // 16 * 16
            pixels = pixels.narrow(dim, (pixels.shape[dim] - size) // 2, size)
        picture = pixels[..., :3].movedim(-1, 1).to(self.device, torch.float32) * 2 - 1
        latents = Flux2Pipeline._patchify_latents(self.vae.encode(picture).latent_dist.mode())
        mean, std = self._mean_and_std()
        return ((latents - mean) / std).to(comfy.model_management.intermediate_device())

    def decode_tiled(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        """As decode(): tiles are a matter of memory, and an oracle has none of their seams."""
        return self.decode(samples)

    def encode_tiled(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        """As encode()."""
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        return 16

    def spacial_compression_encode(self) -> int:
        return 16

    def temporal_compression_decode(self) -> None:
        return None


def find_pipeline(name: str) -> Path:
    """The folder of pipeline ``name`` below one of the folders that ComfyUI has for "diffusers"."""
    folders = folder_paths.get_folder_paths("diffusers")
    for folder in folders:
        if (Path(folder) / name / "model_index.json").is_file():
            return Path(folder) / name
    raise ValueError(f"no pipeline folder {name!r} in {folders}")


def load_pipeline(folder: Path) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, ReferenceVAE]:
    """MODEL, CLIP and VAE of a FLUX.2 pipeline folder."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    transformer = Flux2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    text_encoder = Mistral3ForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return build_model(transformer), build_clip(text_encoder, tokenizer), ReferenceVAE(vae)


class ReferencePipelineLoader:
    """Takes the place of the pack's pipeline loader in a graph; layout and dtype are accepted and ignored."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pipeline": ("STRING", {"default": "flux2-tiny"})},
            "optional": {"layout": ("*", {"forceInput": True}), "dtype": ("*", {})},
        }

    def load(self, pipeline: str, layout: Any = None, dtype: Any = None) -> tuple[Any, Any, Any]:
        folder = find_pipeline(pipeline)
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
        return load_qwen_pipeline(folder) if kind.startswith("QwenImage") else load_pipeline(folder)


class ReferenceEncodeTogether:
    """Two texts of one length as one batch, each token with a weight."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {})
        return {
            "required": {"clip": ("CLIP",), "first": text, "second": text, "weight": ("FLOAT", {})},
            "optional": {"images": ("IMAGE",)},
        }

    def encode(self, clip: Any, first: str, second: str, weight: float, images: Any = None) -> tuple[list]:
        """Of ``images``, each text gets one."""
        given = [{}, {}] if images is None else [{"images": [image]} for image in images.split(1)]
        tokens = [clip.tokenize(text, **one) for text, one in zip((first, second), given, strict=True)]
        (key,) = tokens[0]
        sections = [[(token, weight) for token, _ in each[key][0]] for each in tokens]
        return (clip.encode_from_tokens_scheduled({key: sections}),)


class ReferenceMethod:
    """Any reference method, also one that no stock node offers."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "set_method"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "method": ("STRING", {})}}

    def set_method(self, conditioning: Any, method: str) -> tuple[list]:
        return ([[tensor, {**extras, "reference_latents_method": method}] for tensor, extras in conditioning],)


class ReferenceFloatMask:
    """The attention mask of a conditioning as what is added to scores: 0, and ``-scale`` where it hides a token."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "convert"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "scale": ("FLOAT", {"max": 1e9})}}

    def convert(self, conditioning: Any, scale: float) -> tuple[list]:
        return (
            [[t, {**extras, "attention_mask": (extras["attention_mask"] - 1.0) * scale}] for t, extras in conditioning],
        )


class ReferenceEncodeWithImage:
    """Hands a CLIP an image beside the text, as nodes of models that look at pictures do."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"clip": ("CLIP",), "image": ("IMAGE",), "text": ("STRING", {})}}

    def encode(self, clip: Any, image: torch.Tensor, text: str) -> tuple[list]:
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text, images=[image])),)


class ReferenceLittleRoom:
    """A parallel MODEL whose workers have room for one conditioning at a time."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def apply(self, model: Any) -> tuple[Any]:
        changed = model.clone()
        changed.model = copy.copy(model.model)
        changed.model._modules = dict(model.model._modules)
        changed.model.diffusion_model = copy.copy(model.model.diffusion_model)
        handle = model.model.diffusion_model.handle
        errors = sys.modules[type(handle.get()).__module__.replace("client.remote_model", "errors")]

        def predict(*args: Any, divisible: bool, **options: Any) -> torch.Tensor:
            if divisible:
                raise errors.BatchTooLargeError(f"a batch of {len(args[0])} is too large")
            return handle.get().predict(*args, **options)

        changed.model.diffusion_model.handle = SimpleNamespace(get=lambda *_: SimpleNamespace(predict=predict))
        return (changed,)


class ReferenceExtraArgument:
    """Hands a model an argument that it does not have, as nodes for other models do."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def apply(self, model: Any, name: str) -> tuple[Any]:
        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return executor(*args, **kwargs, **{name: torch.ones(1)})

        changed = model.clone()
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        changed.add_wrapper_with_key(kind, "reference_pack", wrapper)
        return (changed,)


class ReferenceSaveConditioning:
    """Writes a conditioning to the output folder as it is, for the tests to compare."""

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}}

    def save(self, conditioning: Any, name: str) -> dict[str, Any]:
        (tensor, extras), *more = conditioning
        assert not more
        kept = {"cond": tensor, **{key: value for key, value in extras.items() if isinstance(value, torch.Tensor)}}
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({key: value.float().contiguous() for key, value in kept.items()}, path)
        return {"ui": {"text": [path.name]}}


_NODES = (
    ReferencePipelineLoader,
    ReferenceConditioning,
    ReferenceText,
    ReferenceTextEncoder,
    ReferenceRandomClip,
    ReferenceVideoLatent,
    ReferenceVideoVae,
    ReferenceVision,
    ReferenceQwenClip,
    ReferenceQwenImage,
    ReferenceZImage,
    ReferenceClip,
    ReferenceNoText,
    ReferenceSaveTensor,
    ReferenceWanVAE,
    ReferenceTokenizerOption,
    ReferenceEncodeTogether,
    ReferenceEncodeWithImage,
    ReferenceMethod,
    ReferenceFloatMask,
    ReferenceLittleRoom,
    ReferenceExtraArgument,
    ReferenceChange,
    ReferenceControl,
    ReferenceLook,
    ReferenceLoraModel,
    ReferenceSaveConditioning,
    ReferenceStandIn,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
