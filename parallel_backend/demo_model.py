"""Small FLUX.2 pipelines: where the trained one is, and how ones with random weights are made.

They stand in for the 100 GB of FLUX.2-dev in the demo, the tests and the example workflows. The layout on disk is the
one of ``black-forest-labs/FLUX.2-dev``, so everything that reads that reads these.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEMO_FOLDER_NAME = "flux2-demo"

# Random keys are all alike to a random query, so a few prompt words would drown in the 500 padding tokens of FLUX.2's
# text. Sharper attention (the weight of the q and k norms) lets them be heard; at twice this the model becomes chaotic.
ATTENTION_SHARPNESS = 2.0

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")

# Renders a conversation as Mistral-Small-3.2's template does; `content` is a string or a list of text parts.
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- else -%}{{- '[IMG]' -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- '[SYSTEM_PROMPT]' + text_of(message['content']) + '[/SYSTEM_PROMPT]' -}}
{%- elif message['role'] == 'user' -%}{{- '[INST]' + text_of(message['content']) + '[/INST]' -}}
{%- else -%}{{- text_of(message['content']) + '</s>' -}}{%- endif -%}
{%- endfor -%}"""

# What people ask a demo for; together with the system message it decides which words are one token.
_CORPUS = """\
a red circle on a blue square, a green triangle, a yellow ring, a white background
a photo of a cat sitting on a wooden table, a dog running on the beach, a horse in a field, a bird in the sky
a portrait of an old man with a long beard, a young woman with red hair, a child with a balloon, smiling
a castle on a hill at sunset, a mountain lake in the morning, a forest in the fog, a city street at night in the rain
a bowl of fruit, a cup of coffee, a glass of water, a vase of flowers, soft light, studio lighting, shallow depth
an astronaut riding a horse on the moon, a robot painting a picture, a dragon flying over the sea, a ship in a storm
oil painting, watercolor, pencil drawing, digital art, 3d render, pixel art, cinematic, highly detailed, 35mm film
make the sky orange, replace the cat with a fox, add snow to the picture, remove the person, change the style to anime
a sign that says hello world, the text in bold letters, low quality, blurry, bad anatomy, watermark, over exposed
the of to in on at with and from by for over under between behind next front left right top bottom small large big tiny
"""


@dataclass(frozen=True)
class DemoSize:
    """Dimensions of one demo pipeline; all else follows FLUX.2-dev."""

    heads: int
    head_dim: int
    axes_dims_rope: tuple[int, int, int, int]
    double_blocks: int
    single_blocks: int
    text_hidden: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    text_layers: int
    text_intermediate: int
    text_out_layers: tuple[int, int, int]
    vae_channels: tuple[int, int, int, int]
    vae_norm_groups: int
    vae_layers_per_block: int
    dtype: torch.dtype
    text_rope_theta: float = 1e9


SIZES = {
    "tiny": DemoSize(
        heads=8, head_dim=16, axes_dims_rope=(4, 4, 4, 4), double_blocks=2, single_blocks=3,
        text_hidden=64, text_heads=8, text_kv_heads=2, text_head_dim=16, text_layers=5, text_intermediate=128,
        text_out_layers=(1, 2, 4),
        vae_channels=(8, 8, 16, 16), vae_norm_groups=4, vae_layers_per_block=1, dtype=torch.float32,
    ),
    "demo": DemoSize(
        heads=8, head_dim=24, axes_dims_rope=(6, 6, 6, 6), double_blocks=3, single_blocks=12,
        text_hidden=128, text_heads=8, text_kv_heads=4, text_head_dim=16, text_layers=6, text_intermediate=256,
        text_out_layers=(1, 3, 5),
        vae_channels=(16, 16, 32, 32), vae_norm_groups=8, vae_layers_per_block=1, dtype=torch.bfloat16,
    ),
}  # fmt: skip


def demo_folder() -> Path:
    """The trained demo pipeline, which comes with this package; ``training/`` has its recipe.

    It draws one to three shapes: "a large red circle left of a small blue star on a grey background".
    """
    return Path(__file__).parent / "models" / DEMO_FOLDER_NAME


def make_demo_pipeline(folder: Path, *, size: str = "demo", seed: int = 0) -> Path:
    """Write a pipeline with random weights that ``diffusers.Flux2Pipeline.from_pretrained`` loads; returns ``folder``.

    Nothing is done where ``folder`` already holds a pipeline. The folder appears complete or not at all, so any number
    of processes may call this at the same time.

    Args:
        folder: the pipeline folder to make.
        size: ``"demo"`` (8 heads of 24, 15 blocks, saved in bfloat16) or ``"tiny"`` (8 heads of 16, 5 blocks, saved
            in float32, for tests).
        seed: decides all weights; the same seed gives the same weights.
    """
    folder = Path(folder)
    if size not in SIZES:
        raise ValueError(f"size={size!r} is not one of {sorted(SIZES)}")
    if (folder / "model_index.json").exists():
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and is no pipeline folder (no model_index.json): choose another one")

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        _build_pipeline(SIZES[size], seed).save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process was first. What it wrote is as good as ours.
            if not (folder / "model_index.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _build_pipeline(size: DemoSize, seed: int) -> Any:
    tokenizer = _build_tokenizer()
    with _own_random_state(seed):
        return assemble_pipeline(
            tokenizer,
            transformer=_build_transformer(size),
            text_encoder=_build_text_encoder(size, tokenizer),
            vae=_build_vae(size),
            dtype=size.dtype,
        )


def assemble_pipeline(
    tokenizer: Any, *, transformer: nn.Module, text_encoder: nn.Module, vae: nn.Module, dtype: torch.dtype
) -> Any:
    """A `Flux2Pipeline` of these models, cast to ``dtype``, with FLUX.2-dev's scheduler."""
    # Imported here: demo_folder() must stay cheap for callers that only look whether the demo is there.
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    for model in (transformer, text_encoder, vae):
        # Not model.to(): diffusers' override warns about modules to keep in float32 where there are none.
        nn.Module.to(model, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )
    return Flux2Pipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _build_tokenizer() -> Any:
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    # Each word also at the start of a text, where it has no leading space.
    words = sorted(set(_CORPUS.replace(",", " ").split()))
    return new_tokenizer([SYSTEM_MESSAGE] * 4 + _CORPUS.splitlines() * 2 + words, vocab_size=2048)


def new_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer, as Mistral's, learnt from ``texts``, with FLUX.2's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token.startswith("[")],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def new_transformer(size: DemoSize) -> Any:
    """The transformer of a size, with the weights that diffusers gives it."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=3 * size.text_hidden,
        mlp_ratio=3.0,
        axes_dims_rope=size.axes_dims_rope,
        rope_theta=2000,
        guidance_embeds=True,
    )


def _build_transformer(size: DemoSize) -> nn.Module:
    model = new_transformer(size)
    _init_unit_variance(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                module.weight.fill_(ATTENTION_SHARPNESS)
    return model.eval()


def new_text_encoder(size: DemoSize, tokenizer: Any) -> Any:
    """The text encoder of a size for a tokenizer, with the weights that transformers gives it."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text_config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_hidden,
        intermediate_size=size.text_intermediate,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_kv_heads,
        head_dim=size.text_head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": size.text_rope_theta},
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    config = Mistral3Config(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
        # Not an attribute of Mistral3Config: FLUX.2's pipeline has (10, 20, 30) as a default argument, and a model with
        # fewer layers must say which ones it means.
        text_encoder_out_layers=list(size.text_out_layers),
    )
    return Mistral3ForConditionalGeneration(config)


def _build_text_encoder(size: DemoSize, tokenizer: Any) -> nn.Module:
    model = new_text_encoder(size, tokenizer)
    _init_unit_variance(model)
    return model.eval()


def new_vae(size: DemoSize) -> Any:
    """The VAE of a size, with the weights that diffusers gives it."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=size.vae_channels,
        layers_per_block=size.vae_layers_per_block,
        latent_channels=32,
        norm_num_groups=size.vae_norm_groups,
        sample_size=1024,
    )


def _build_vae(size: DemoSize) -> nn.Module:
    model = new_vae(size)
    _init_unit_variance(model)
    model.eval()
    with torch.no_grad():
        # The encoder gives latents of unit variance for a soft picture, the decoder a picture that uses, and does not
        # leave, the range -1..1 for latents of unit variance.
        coarse = torch.randn(2, 3, 6, 6)
        picture = nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic").mul(0.5).clamp(-1, 1)
        _standardize_output(model.quant_conv, model.encoder(picture), slice(0, 32), 1.0)
        _standardize_output(model.decoder.conv_out, _input_of(model.decoder.conv_out, model, 12), slice(None), 0.45)
    return model


def _input_of(module: nn.Module, vae: Any, latent_size: int) -> torch.Tensor:
    """What ``module`` of the decoder gets while a random latent of ``latent_size`` squared is decoded."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vae.decode(torch.randn(2, 32, latent_size, latent_size))
    handle.remove()
    return seen[0]


def _standardize_output(conv: Any, inputs: torch.Tensor, channels: slice, std: float) -> None:
    """Give the output ``channels`` of ``conv`` mean 0 and standard deviation ``std`` over ``inputs`` [B, C, H, W]."""
    out = conv(inputs)[:, channels]
    scale = std / out.std(dim=(0, 2, 3)).clamp_min(1e-6)
    conv.bias[channels] = (conv.bias[channels] - out.mean(dim=(0, 2, 3))) * scale
    conv.weight[channels] *= scale.view(-1, 1, 1, 1)


def _init_unit_variance(model: nn.Module) -> None:
    """Draw all weights so that unit variance in gives unit variance out of every linear and convolution."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
