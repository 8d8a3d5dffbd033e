"""What files of models that are not supported look like, for the messages that refuse them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "transformer.")
"""That may stand before the keys below."""

# Checked before the families: files of these have keys of a supported model, too.
_PATCHES = {
    "lora_A.weight": "a LoRA",
    "lora_B.weight": "a LoRA",
    "lora_A.default.weight": "a LoRA",
    "lora_up.weight": "a LoRA",
    "lora_down.weight": "a LoRA",
    "lora.up.weight": "a LoRA",
    "lora.down.weight": "a LoRA",
    "hada_w1_a": "a LoRA (LoHa)",
    "lokr_w1": "a LoRA (LoKr)",
    "lokr_w1_a": "a LoRA (LoKr)",
}
"""Ends of keys -> what the file is."""
_QUANTIZED = {
    ".bitsandbytes__nf4": "a bitsandbytes file (nf4)",
    ".bitsandbytes__fp4": "a bitsandbytes file (fp4)",
    ".SCB": "a bitsandbytes file (int8)",
    ".wscales": "an SVDQuant file (nunchaku)",
    ".smooth_factor_orig": "an SVDQuant file (nunchaku)",
    ".qzeros": "a GPTQ or AWQ file",
    ".g_idx": "a GPTQ file",
    ".qweight": "an SVDQuant file (nunchaku)",
    "._data": "a quanto file",
    "qdata": "a torchao file",
    ".W_q": "an HQQ file",
    ".biases": "an MLX file",
    ".encoded_exponent": "a DFloat11 file",
}
"""Ends of keys beside weights, or in their place -> who wrote the file. The first that is found counts."""
INSTEAD = "take the model in bf16, or in fp8 with a scale a tensor or a row, or in ComfyUI's int8 or nvfp4"
"""The remedy for numbers in a format that is not read."""
_NOT_QUITE = {
    "controlnet_blocks.0.weight": "a ControlNet",
    "controlnet_blocks.0.linear.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "control_blocks.0.after_proj.weight": "a ControlNet",
    "control_img_in.weight": "a ControlNet",
    "control_model.zero_convs.0.0.weight": "a ControlNet",
    "input_hint_block.0.weight": "a ControlNet",
    "lora_controlnet": "a ControlNet",
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
    "transformer_blocks.0.img_mlp.w1.weight": "Lens",
}

_TRANSFORMERS = {
    # What ComfyUI names as FLUX.1 has, and more, comes first.
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo or HunyuanImage",
    "distilled_guidance_layer.norms.0.scale": "Chroma",
    "distilled_guidance_layer.norms.0.weight": "Chroma",
    "distilled_guidance_layer.0.norms.0.scale": "Chroma",
    "latent_in.weight": "Hunyuan3D",
    "double_blocks.0.img_attn.qkv.weight": "FLUX.1",
    "cap_embedder.1.weight": "Lumina 2",
    "time_caption_embed.timestep_embedder.linear_1.bias": "OmniGen 2",
    "joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3",
    "mlp_t5.0.weight": "HunyuanDiT",
    "t_block.1.weight": "PixArt",
    "pos_embed.proj.bias": "PixArt",
    "adaln_single.emb.timestep_embedder.linear_1.bias": "LTX-Video",
    "t5_yproj.weight": "Mochi",
    "blocks.0.norm1.linear.weight": "CogVideoX",
    "caption_projection.0.linear.weight": "HiDream",
    "blocks.block0.blocks.0.block.attn.to_q.0.weight": "Cosmos",
    "blocks.0.mlp.layer1.weight": "Cosmos Predict 2",
    "visual_transformer_blocks.0.cross_attention.key_norm.weight": "Kandinsky 5",
    "double_layers.0.attn.w1q.weight": "AuraFlow",
    "clf.1.weight": "Stable Cascade",
    "label_emb.0.0.weight": "SDXL",
    "input_blocks.0.0.weight": "Stable Diffusion 1.5 or 2",
}
_DIFFUSERS = {
    "double_stream_modulation_img.linear.weight": "FLUX.2",
    "all_x_embedder.2-1.weight": "Z-Image",
    "single_transformer_blocks.0.attn.to_q.weight": "FLUX.1",
}
_FOLDERS = ("FLUX.2",)
"""Of these, pipeline folders are read."""
_VAE = (
    "decoder.conv_in.weight",
    "decoder.conv_in.conv.weight",
    "decoder.middle.0.residual.0.gamma",
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
    "first_stage_model.decoder.conv_in.weight",
    "taesd_decoder.1.weight",
)
_SOME_VAE = "a VAE"
_WANS_UMT5 = "umT5 by the names of Wan's own code"
_TEXT_ENCODERS = {
    "blocks.0.pos_embedding.embedding.weight": _WANS_UMT5,
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5",
    "encoder.block.0.layer.0.SelfAttention.k.weight": "T5",
    "shared.weight": "T5",
    "text_model.encoder.layers.0.self_attn.q_proj.weight": "CLIP",
    "text_model.encoder.layers.0.mlp.fc1.weight": "CLIP",
    "model.layers.0.post_feedforward_layernorm.weight": "Gemma",
    "model.layers.0.pre_feedforward_layernorm.weight": "Gemma",
    "model.visual.deepstack_merger_list.0.norm.weight": "Qwen3-VL",
    "visual.deepstack_merger_list.0.norm.weight": "Qwen3-VL",
    "model.layers.0.self_attn.q_norm.weight": "Qwen3 (of FLUX.2 klein and Z-Image)",
    "model.layers.0.self_attn.k_proj.bias": "Qwen2.5",
    "model.layers.0.self_attn.q_proj.weight": "Llama",
}

SUFFIXES = {
    ".gguf": "a GGUF file, whose number formats are not read",
    ".onnx": "an ONNX graph",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
    ".ckpt": "a pickle",
    ".pt": "a pickle",
    ".pth": "a pickle",
    ".bin": "a pickle or something else",
}
"""Of files that are not read at all -> what they are."""


class Look(NamedTuple):
    """What a file looks like, such as ``a ControlNet``, and what to do with it, if anything."""

    name: str
    remedy: str = ""

    def refusal(self, where: object, supported: str, files: str) -> str:
        """The message: this file is not read, and what is; ``files`` names some whose numbers are."""
        remedy = f": {self.remedy}" if self.remedy else ""
        remedy += f", such as {files}" if self.remedy == INSTEAD else ""
        return f"{where} looks like {self.name}, which is not supported here{remedy}; {supported}"


CONTENTS = {
    b"GGUF": Look("a GGUF file", INSTEAD),
    b"PK\x03\x04": Look("a pickle of PyTorch", INSTEAD),
    b"\x80\x02": Look("a pickle", INSTEAD),
    b"version ": Look("a pointer of Git LFS", "download it again, or run git lfs pull"),
    b"<": Look("a web page, as a server sends it in the place of the file", "log in there and download it again"),
}
"""First bytes of what is called a safetensors file and is none -> what it is."""


def looks_like_part(keys: Collection[str]) -> Look | None:
    """What a file is that has a supported model's keys, or some of them, and is not that model; None if it is not.

    Args:
        keys: of all tensors in the file.
    """
    for end, name in _QUANTIZED.items():
        if any(key.endswith(end) for key in keys):
            return Look(name, INSTEAD)
    for end, name in _PATCHES.items():
        if any(key.endswith(end) for key in keys):
            return Look(name, "bypass the LoRA loader")
    found = _find(_NOT_QUITE, keys)
    return Look(found) if found else None


def looks_like_transformer(keys: Collection[str]) -> Look | None:
    """What a file is that is no supported model's transformer; None if nothing here tells."""
    if name := _find(_TEXT_ENCODERS, keys):
        return Look(f"the text encoder {name}")
    if name := _find(_DIFFUSERS, keys):
        folder = "give its pipeline folder to Load Pipeline (Parallel), or " if name in _FOLDERS else ""
        return Look(f"{name} by diffusers' names", f"{folder}take the file that ComfyUI's templates name")
    if name := _find(_TRANSFORMERS, keys):
        return Look(name)
    if any(key in keys for key in _VAE):
        return Look(_SOME_VAE, "Load VAE (Parallel) or ComfyUI's own Load VAE loads it")
    return None


def looks_like_vae(keys: Collection[str]) -> Look | None:
    """What a file is that is no supported VAE; None if nothing here tells."""
    look = looks_like_part(keys) or looks_like_transformer(keys)
    if look is not None and look.name == _SOME_VAE:
        return Look("another model's VAE", "ComfyUI's own Load VAE loads it")
    return Look(look.name, look.remedy) if look else None


def looks_like_text_encoder(keys: Collection[str]) -> Look | None:
    """What a file is that is no supported text encoder; None if nothing here tells."""
    if name := _find(_TEXT_ENCODERS, keys):
        if name == _WANS_UMT5:
            return Look(name, "take the file that ComfyUI's templates name")
        return Look(name, "ComfyUI's own Load CLIP loads it")
    look = looks_like_transformer(keys)
    return Look(f"the diffusion model {look.name}") if look and look.name in _TRANSFORMERS.values() else look


def _find(names: Mapping[str, str], keys: Collection[str]) -> str | None:
    return next((name for key, name in names.items() if any(prefix + key in keys for prefix in PREFIXES)), None)
