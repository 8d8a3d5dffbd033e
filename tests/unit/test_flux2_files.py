"""FLUX.2's VAE and tokenizer as ComfyUI's files have them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file

from parallel_backend.families import family_of_name
from parallel_backend.families.flux2.drawing import conversation, tokenizer_of_tekken
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.vae_file import VaeFile
from tests.text_encoder_file import SPECIAL, tekken

TO_BFL = [
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(\w)", r"mid.attn_1.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
]
"""diffusers' names -> Black Forest Labs'."""


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLFlux2:
    """Small, and with a smaller decoder than encoder, all of it random."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(block_out_channels=(32, 32, 64, 64), decoder_block_out_channels=(32, 32, 32, 64))
    for tensor in vae.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.1)
    return vae.eval()


def bfl_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What Black Forest Labs' file has: also 1 x 1 convolutions in attention."""
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, to in TO_BFL:
            new = re.sub(pattern, to, new)
        linear = "attn_1" in new and new.endswith("weight") and tensor.ndim == 2
        renamed[new] = tensor[:, :, None, None].contiguous() if linear else tensor
    return renamed


@pytest.mark.parametrize("names", [dict, bfl_names], ids=["diffusers", "black-forest-labs"])
def test_vae(vae, names, tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file(names(vae.state_dict()), file)
    source = open_checkpoint(file)
    assert isinstance(source, VaeFile)
    assert (source.family.name, source.components) == ("flux2", ("vae",))
    loaded = source.load().state_dict()
    wanted = vae.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("decoder.conv_out.bias", "Missing key.*decoder.conv_out.bias"),
        ("decoder.up_blocks.3.resnets.0.conv1.weight", "there is no tensor decoder.up_blocks.3"),
    ],
)
def test_a_vae_that_is_not_whole(vae, tmp_path, key, message):
    file = tmp_path / "vae.safetensors"
    save_file({name: tensor for name, tensor in vae.state_dict().items() if name != key}, file)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(file).load()


def test_tokenizer():
    tokenizer = tokenizer_of_tekken(tekken())
    given = [conversation("a red circle")]
    ids = tokenizer.apply_chat_template(given, tokenize=True, return_dict=True, padding="max_length", max_length=512)
    ids = ids["input_ids"][0]
    names = {name: number for number, name in SPECIAL.items()}
    assert ids.count(names["<pad>"]) == 512 - len([number for number in ids if number != names["<pad>"]])
    assert ids[0] == names["<pad>"]  # in front
    said = [number for number in ids if number != names["<pad>"]]
    assert said[:2] == [names["<s>"], names["[SYSTEM_PROMPT]"]]
    start = said.index(names["[INST]"])
    assert said[start - 1] == names["[/SYSTEM_PROMPT]"]
    assert said[-1] == names["[/INST]"]
    assert tokenizer.decode(said[start + 1 : -1]) == "a red circle"
    assert len(said[start + 1 : -1]) < len("a red circle")  # merged


@pytest.mark.parametrize("kind", ["Flux2KleinPipeline", "Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline"])
def test_a_folder_of_klein(tmp_path, kind):
    """Its text encoder is not one that the workers hold; its transformer's file is loaded like FLUX.2-dev's."""
    assert family_of_name("klein-base-9b").transformer.title == "FLUX.2"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    message = (
        rf"{kind} are not read: .*its file with Load Diffusion Model \(Parallel\), and text encoder and VAE with Com"
    )
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)
