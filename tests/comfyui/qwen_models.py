"""A small random Qwen-Image that ComfyUI's own classes take too, as a pipeline folder and as ComfyUI's files.

It has ComfyUI's bundled vocabulary, as ComfyUI's tokenizer knows a few of its ids by number, heads of 128 features in
the text encoder, and vision towers with one block that sees the whole image.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny_pipeline import init_unit_variance
from tests.tiny_qwen import SCHEDULER, single_file_tensors, tiny_transformer

PIPELINE, ZERO = "tiny-qwen", "tiny-qwen-zero"
"""Names of the pipeline folders; the second takes references as at timestep 0."""
VOCAB, HIDDEN = 152064, 256
CONFIG = {
    "text_config": {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 8, "hidden_size": 160, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "tie_word_embeddings": True,  # so that the head, which nobody uses, is not stored
}  # fmt: skip


def make_qwen_pipeline(folder: Path, tokenizer: Path) -> Path:
    """Write the pipeline folder; ``tokenizer`` has the tokenizer's files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny_transformer(joint_attention_dim=HIDDEN).save_pretrained(folder / "transformer")
        _text_encoder().save_pretrained(folder / "text_encoder")
        random_vae().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer")
    index = {
        "_class_name": "QwenImageEditPlusPipeline",
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_zero_pipeline(folder: Path, like: Path) -> Path:
    """The same pipeline, of the kind whose references are at timestep 0 where a graph does not say otherwise."""
    shutil.copytree(like, folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "zero_cond_t": True}))
    return folder


def write_transformer(path: Path, pipeline: Path) -> Path:
    """A pipeline's transformer as ComfyUI's file."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(pipeline / "transformer")
    save_file(dict(single_file_tensors(model)), path)
    return path


def write_text_encoder(path: Path, pipeline: Path) -> Path:
    """A pipeline's text encoder as ComfyUI's file."""
    tensors = load_file(pipeline / "text_encoder" / "model.safetensors")
    save_file({re.sub(r"^model\.visual", "visual", _plain(name)): tensor for name, tensor in tensors.items()}, path)
    return path


def _plain(name: str) -> str:
    return name.replace("model.language_model.", "model.")


def _text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**CONFIG))
    init_unit_variance(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    return model.eval()


def random_vae(base_dim: int = 16) -> AutoencoderKLQwenImage:
    """A sixth of the real one's channels; ComfyUI knows one number of blocks a level alone."""
    model = AutoencoderKLQwenImage(base_dim=base_dim, num_res_blocks=2)
    init_unit_variance(model)
    with torch.no_grad():
        picture = torch.nn.functional.interpolate(torch.randn(2, 3, 6, 6), size=(96, 96), mode="bicubic").mul(0.5)
        spread = model.encode(picture.clamp(-1, 1).unsqueeze(2)).latent_dist.mean.std()
        model.quant_conv.weight[:16] *= torch.tensor(model.config.latents_std).mean() / spread
        latent = 3 * torch.randn(2, 16, 1, 12, 12)
        # Within -1..1 throughout: diffusers' decoder cuts off what is beyond, ComfyUI only after it has joined tiles.
        model.decoder.conv_out.weight.mul_(0.06 / model.decode(latent).sample.std())
    return model.eval()
