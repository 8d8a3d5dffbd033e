"""Files of Wan's VAEs as ComfyUI has them: their configuration, their tensors, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.vae_file import VaeFile, open_known_vae_file
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import write_text
from tests.vae_file import write_tiny_vae
from tests.wan_vae import comfy_tensors, tiny_vae, write_wan_vae


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
def test_each_tensor_finds_its_place(tmp_path, kind):
    source = open_checkpoint(write_wan_vae(tmp_path / "vae.safetensors", kind))
    assert isinstance(source, VaeFile)
    assert source.components == ("vae",)
    vae = tiny_vae(kind)
    loaded, wanted = source.load(), vae.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in wanted.items())
    for name in ("z_dim", "base_dim", "latents_mean", "latents_std", "is_residual", "patch_size"):
        assert loaded.config[name] == vae.config[name]
    shape = source.family.needs_vae().latent_shape(source.vae_config)
    assert (shape.channels, shape.downscale, shape.frames) == ((16, 8, 4) if kind == "2.1" else (48, 16, 4))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("decoder.middle.1.proj.weight", "Missing key.*decoder.mid_block.attentions.0.proj.weight"),
        ("encoder.conv1.weight", "there is no tensor encoder.conv1.weight"),
    ],
)
def test_one_that_is_not_whole(tmp_path, key, message):
    tensors = comfy_tensors(tiny_vae("2.1"))
    del tensors[key]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=message):
        open_known_vae_file(tmp_path / "vae.safetensors").load()


def test_one_with_too_many_tensors(tmp_path):
    save_file({**comfy_tensors(tiny_vae("2.1")), "decoder.more": torch.zeros(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"Unexpected key.*decoder\.more"):
        open_known_vae_file(tmp_path / "vae.safetensors").load()


def test_one_with_transparency(tmp_path):
    tensors = comfy_tensors(tiny_vae("2.1"))
    tensors["encoder.conv1.weight"] = torch.zeros(8, 4, 3, 3, 3)
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"4 channels of a picture .*where 3 are expected.*Qwen-Image-Layered"):
        open_known_vae_file(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("write_file", "message"),
    [
        (write_tiny_vae, "looks like another model's VAE, .*: ComfyUI's own Load VAE loads it; supported are FLUX.2"),
        (write_text, r"the text encoder of FLUX\.2, which Load CLIP \(Parallel\) loads"),
        (
            lambda path: write(path, flux2_tensors()),
            r"the transformer of FLUX\.2, which Load Diffusion Model \(Parallel\) loads",
        ),
        (lambda path: write(path, {"a.lora_A.weight": torch.zeros(1)}), "looks like a LoRA"),
        (lambda path: write(path, {"nothing": torch.zeros(1)}), "has 1 tensors, which is no VAE that is known here"),
    ],
    ids=["another VAE", "text encoder", "transformer", "LoRA", "nothing known"],
)
def test_what_is_none(tmp_path, write_file, message):
    file = tmp_path / "file.safetensors"
    write_file(file)
    with pytest.raises(ValueError, match=message):
        open_known_vae_file(file)
