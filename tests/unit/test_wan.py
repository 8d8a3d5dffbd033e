"""Wan's file: diffusers' own conversion is the oracle; what is not whole or another model is refused."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_name, family_of_pipeline
from parallel_backend.families.wan import files
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.products import product_of
from parallel_backend.parallel.tensor import apply_tensor_parallel
from parallel_backend.planning.memory import reference_config, transformer_activation_bytes
from parallel_backend.runtime import group_config
from parallel_backend.runtime.group_config import ModelConfig
from tests.single_file import to_fp8, write
from tests.umt5_file import write_umt5
from tests.wan_file import wan_tensors

CPU = torch.device("cpu")
WAN = family_of_name("wan")
SIZES = {
    "T2V": {},
    "I2V 2.2": {"channels": 36},
    "I2V 2.1": {"channels": 36, "image": True},
    "FLF2V 2.1": {"channels": 36, "image": True, "image_places": 14},
    "TI2V 5B": {"channels": 48, "out": 48},
    "Fun Control": {"channels": 52, "first_frame": 16},
}


def load(path, dtype=torch.float32, fp8="cast", axis=None):
    source = open_single_file(path)
    kind = source.family.transformer
    model = kind.build(source.transformer_config)
    table = apply_tensor_parallel(model, kind.plan(source.transformer_config), axis) if axis else {}
    load_weights(model, source.weights("transformer"), table, device=CPU, dtype=dtype, fp8=fp8)
    return model


@pytest.mark.parametrize("variant", SIZES)
def test_every_parameter_is_what_diffusers_makes_of_the_file(tmp_path, variant):
    tensors = wan_tensors(**SIZES[variant])
    # What diffusers' conversion leaves under its old name.
    renames = {
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "condition_embedder.image_embedder.emb_pos": "condition_embedder.image_embedder.pos_embed",
    }
    expected = convert_wan_transformer_to_diffusers(dict(tensors))
    expected = {renames.get(name, name): tensor for name, tensor in expected.items()}
    actual = dict(load(write(tmp_path / "wan.safetensors", tensors, "model.diffusion_model.")).named_parameters())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    # The norm before cross-attention is ComfyUI's third and diffusers' second.
    assert torch.equal(actual["blocks.1.norm2.weight"], tensors["blocks.1.norm3.weight"])


@pytest.mark.parametrize("variant", SIZES)
def test_the_configuration_is_that_of_the_shapes(tmp_path, variant):
    source = open_single_file(write(tmp_path / "wan.safetensors", wan_tensors(heads=3, **SIZES[variant])))
    config, size = source.transformer_config, SIZES[variant]
    assert source.family is WAN
    assert (config["num_attention_heads"], config["num_layers"], config["ffn_dim"]) == (3, 2, 640)
    assert (config["in_channels"], config["out_channels"]) == (size.get("channels", 16), size.get("out", 16))
    assert config.get("pos_embed_seq_len") == (14 if "image_places" in size else None)
    look = WAN.transformer.latent_look(config)
    assert look == ((48, 16, 32) if variant == "TI2V 5B" else (16, 8, 16))
    assert WAN.transformer.concat_channels(config) == size.get("channels", 16) - look.channels
    with pytest.raises(ValueError, match="3 attention heads, which do not divide by tp x ulysses = 2"):
        source.check(ParallelismConfig(tp_size=2))


@pytest.mark.parametrize("layout", ["metadata", "comfy_quant", "scaled_fp8"])
@pytest.mark.parametrize("fp8", ["cast", "stored"])
def test_fp8(tmp_path, layout, fp8):
    """Practically all linears of its fp8 files are in fp8, also those for time and text, and the last one."""
    tensors = wan_tensors(mlp=624)
    stored, metadata = to_fp8(tensors, layout, part="")
    path = write(tmp_path / "fp8.safetensors", stored, metadata=metadata)
    whole, exact = load(path), dict(load(write(tmp_path / "wan.safetensors", tensors)).named_parameters())
    for name, parameter in whole.named_parameters():
        in_fp8 = parameter.ndim == 2 and name.endswith(".weight")
        error = (exact[name] - parameter).abs().max() / exact[name].abs().max()
        assert (1e-3 if in_fp8 else 0) <= error < (0.07 if in_fp8 else 0.01), name
    # Half of the heads, of which each has 128 features; of the MLP's 39 units of 16 the second rank has 19.
    part = load(path, fp8=fp8, axis=Axis(None, 2, 1))
    attn, mlp = part.blocks[1].attn2, part.blocks[1].ffn.net
    assert product_of(attn.to_q).dtype == (torch.float32 if fp8 == "cast" else torch.float8_e4m3fn)
    x = torch.randn(2, 256)
    for ours, theirs, rows in (
        (attn.to_q, whole.blocks[1].attn2.to_q, slice(128, 256)),
        (mlp[0].proj, whole.blocks[1].ffn.net[0].proj, slice(320, 624)),
    ):
        assert torch.allclose(ours(x), theirs(x)[:, rows], atol=1e-5)
    assert torch.equal(attn.norm_k.weight, whole.blocks[1].attn2.norm_k.weight[128:])


class TestRefused:
    def refused(self, path, message):
        with pytest.raises(ValueError, match=message) as caught:
            open_single_file(path)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize(
        "key",
        ["blocks.1.self_attn.norm_q.weight", "blocks.0.cross_attn.v.bias", "blocks.0.norm3.bias", "blocks.1.modulation",
         "time_projection.1.weight", "head.head.bias", "text_embedding.2.weight", "patch_embedding.bias"],
    )  # fmt: skip
    def test_a_missing_tensor(self, tmp_path, key):
        tensors = wan_tensors()
        del tensors[key]
        self.refused(write(tmp_path / "wan.safetensors", tensors), rf"no tensor {re.escape(key)}.*incomplete")

    @pytest.mark.parametrize(("key", "title"), files.OTHERS.items())
    def test_its_relatives_by_name(self, tmp_path, key, title):
        path = write(tmp_path / "wan.safetensors", {**wan_tensors(), key: torch.ones(2, 2)})
        self.refused(path, f"this is {re.escape(title)}, which is not supported; T2V, I2V, .* are")

    @pytest.mark.parametrize(
        ("transformer", "title"),
        [({"model_type": "animate2"}, "animate2"), ({"causal_ar": True}, "CausalAR")],
    )
    def test_what_says_that_it_is_another(self, tmp_path, transformer, title):
        """Their tensors are those of T2V, or nearly."""
        path = tmp_path / "wan.safetensors"
        write(path, wan_tensors(), metadata={"config": json.dumps({"transformer": transformer})})
        self.refused(path, f"this is Wan of the kind {title}, which is not supported; T2V, I2V, ")

    @pytest.mark.parametrize("config", ["{", "[]", json.dumps({"transformer": {"model_type": "i2v"}}), "{}"])
    def test_what_says_nothing_of_the_kind(self, tmp_path, config):
        assert open_single_file(write(tmp_path / "wan.safetensors", wan_tensors(), metadata={"config": config}))

    def test_other_tokens(self, tmp_path):
        tensors = wan_tensors()
        tensors["patch_embedding.weight"] = torch.ones(256, 16, 1, 4, 4)
        self.refused(write(tmp_path / "wan.safetensors", tensors), r"its tokens are \[1, 4, 4\] .* of another model")

    def test_a_pipeline_folder(self):
        with pytest.raises(ValueError, match=r"WanPipeline are not read.*files with Load Diffusion Model \(Parallel\)"):
            family_of_pipeline("WanPipeline")


def test_the_sizes_that_are_published():
    kind = WAN.transformer
    models = {
        14.288: {},
        5.000: {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        1.419: {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        16.395: {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    }
    for billions, config in models.items():
        count = sum(parameter.numel() for parameter in kind.build(config).parameters())
        assert count / 1e9 == pytest.approx(billions, abs=2e-3)


def test_what_a_480p_clip_needs_beside_the_weights():
    """Keys and values of four prompts, and the tokens of 81 frames: of those an eighth on eight ranks of Ulysses."""
    config = reference_config(WAN)
    kept = 40 * 2 * 2048 * 5120 * 2
    assert WAN.transformer.kept_bytes(config, 1, 2) == kept
    tokens = WAN.transformer.latent_tokens(config, 832, 480, 81)
    assert tokens == 32760
    whole, eighth = (
        transformer_activation_bytes(WAN, config, ParallelismConfig(ulysses_size=n), tokens) - kept for n in (1, 8)
    )
    assert eighth * 8 == whole == tokens * 10 * 5120 * 2


def test_number_formats_on_gpus(tmp_path, monkeypatch):
    """float16 as in ComfyUI for the transformer, whose range umT5's activations would leave."""
    monkeypatch.setattr(group_config, "check_devices", lambda *_: SimpleNamespace(kind="cuda"))
    transformer, text = write(tmp_path / "wan.safetensors", wan_tensors()), write_umt5(tmp_path / "umt5.safetensors")
    for file, dtype in ((transformer, "float16"), (text, "bfloat16")):
        assert ModelConfig.create(file, ParallelismConfig(), "cuda").dtype == dtype
