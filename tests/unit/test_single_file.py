"""Transformers in one file: diffusers' own conversion is the oracle, rank by rank; what is not whole is named."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from parallel_backend.loading.all_in_one import open_all_in_one
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.products import Product, named_weights
from parallel_backend.parallel.tensor import apply_tensor_parallel
from tests.single_file import flux2_tensors, to_fp8, to_fp8_rows, write

CPU = torch.device("cpu")
QWEN = ("txt_norm.weight", "transformer_blocks.0.img_mod.1.weight")
"""Keys that Qwen-Image's files are told by."""


def load(path, axis=None, dtype=torch.float32, fp8="cast"):
    """A transformer with this rank's weights, and its table."""
    source = open_single_file(path)
    model = source.family.transformer.build(source.transformer_config)
    table = (
        apply_tensor_parallel(model, source.family.transformer.plan(source.transformer_config), axis) if axis else {}
    )
    load_weights(model, source.weights("transformer"), table, device=CPU, dtype=dtype, fp8=fp8)
    return model, table


def converted(tensors):
    return convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False])
def test_every_parameter_is_what_diffusers_makes_of_the_file(tmp_path, prefix, guidance):
    tensors = flux2_tensors(guidance=guidance)
    others = {"first_stage_model.decoder.weight": torch.ones(2, 2)} if prefix.startswith("model") else {}
    write(tmp_path / "model.safetensors", {**{prefix + name: t for name, t in tensors.items()}, **others})
    model, _ = load(tmp_path / "model.safetensors")
    expected = converted(tensors)
    actual = dict(model.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("degree", [2, 4])
def test_a_rank_reads_its_slices(tmp_path, degree):
    tensors = flux2_tensors(heads=4)
    path = write(tmp_path / "model.safetensors", tensors)
    expected = converted(tensors)
    for rank in range(degree):
        model, table = load(path, Axis(None, degree, rank))
        assert table
        for name, parameter in model.named_parameters():
            whole = expected[name]
            assert torch.equal(parameter, table[name].take(whole) if name in table else whole), (rank, name)


def test_the_configuration_is_that_of_the_shapes(tmp_path):
    source = open_single_file(write(tmp_path / "model.safetensors", flux2_tensors(heads=3, double=1, single=2)))
    model = source.family.transformer.build(source.transformer_config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(t.shape) for name, t in converted(flux2_tensors(heads=3, double=1, single=2)).items()
    }
    config = model.config
    assert (config.num_attention_heads, config.attention_head_dim, config.mlp_ratio) == (3, 128, 3.0)
    # What shapes do not say is as published for FLUX.2.
    assert (config.rope_theta, list(config.axes_dims_rope), config.eps) == (2000, [32] * 4, 1e-6)


@pytest.mark.parametrize("layout", ["metadata", "comfy_quant", "scaled_fp8"])
@pytest.mark.parametrize("degree", [1, 2])
def test_fp8_is_multiplied_by_its_scale(tmp_path, layout, degree):
    stored, metadata = to_fp8(flux2_tensors(), layout)
    path = write(tmp_path / "model.safetensors", stored, "model.diffusion_model.", metadata)
    whole = converted(
        {
            name: tensor.float() * stored.get(f"{name[:-7]}.weight_scale", stored.get(f"{name[:-7]}.scale_weight", 1.0))
            for name, tensor in stored.items()
            if tensor.ndim and tensor.dtype != torch.uint8 and name != "scaled_fp8"
        }
    )
    for rank in range(degree):
        model, table = load(path, Axis(None, degree, rank) if degree > 1 else None)
        for name, parameter in model.named_parameters():
            expected = table[name].take(whole[name]) if name in table else whole[name]
            torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("layout", ["metadata", "scaled_fp8"])
def test_fp8_stays_fp8_and_computes_the_same(tmp_path, layout):
    stored, metadata = to_fp8(flux2_tensors(), layout)
    path = write(tmp_path / "model.safetensors", stored, metadata=metadata)
    model, _ = load(path, fp8="stored")
    dense, _ = load(path)
    weights, whole = named_weights(model), named_weights(dense)
    assert weights.keys() == whole.keys()
    in_fp8 = {name for name, weight in weights.items() if weight.dtype == torch.float8_e4m3fn}
    assert in_fp8 == {name for name, weight in weights.items() if "blocks" in name and len(weight.shape) == 2}
    inputs = {
        "hidden_states": torch.randn(1, 12, 128), "encoder_hidden_states": torch.randn(1, 5, 192),
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([4.0]),
        "img_ids": torch.zeros(12, 4), "txt_ids": torch.zeros(5, 4),
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, dense(**inputs).sample, rtol=1e-5, atol=1e-5)


def test_the_header_counts_before_what_tensors_say(tmp_path):
    stored, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True)
    full = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    stored["single_blocks.0.linear1.comfy_quant"] = torch.tensor(list(full), dtype=torch.uint8)
    weights = {}
    for name, told in (("both", metadata), ("tensor", None)):
        weights[name] = open_single_file(
            write(tmp_path / f"{name}.safetensors", stored, metadata=told)
        ).transformer_weights["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"]
    assert weights["both"].fp8_matmul
    assert not weights["tensor"].fp8_matmul


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_keeps_its_slices_in_fp8(tmp_path, rank):
    stored, metadata = to_fp8(flux2_tensors(), "metadata")
    model, table = load(write(tmp_path / "m.safetensors", stored, metadata=metadata), Axis(None, 2, rank), fp8="stored")
    module = model.single_transformer_blocks[1].attn.to_qkv_mlp_proj
    key = "single_blocks.1.linear1"
    expected = table["single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"].take(stored[f"{key}.weight"].float())
    assert module.product.dtype == torch.float8_e4m3fn
    assert torch.equal(module.product.weight.float(), expected)
    assert torch.equal(module.product.scale, stored[f"{key}.weight_scale"])


class TestScalesOfRows:
    """fp8 with a scale for each row, as LightX2V writes it: rows follow the weight's, however it is cut."""

    @pytest.mark.parametrize("fp8", ["cast", "stored", "matmul"])
    @pytest.mark.parametrize("degree", [1, 2, 4])
    def test_each_rank_has_its_rows_and_their_scales(self, tmp_path, degree, fp8):
        """All linears are in 8 bits, also those whose halves change places on the way."""
        stored, meant = to_fp8_rows(flux2_tensors(heads=4), keep_dims=degree != 2)
        path = write(tmp_path / "model.safetensors", stored, "model.diffusion_model." if degree == 4 else "")
        whole = converted(meant)
        for rank in range(degree):
            model, table = load(path, Axis(None, degree, rank) if degree > 1 else None, fp8=fp8)
            cut = {shard.dim for shard in table.values()}
            assert cut == ({0, 1} if degree > 1 else set())
            for name, held in named_weights(model).items():
                assert (held.dtype == torch.float8_e4m3fn) == (fp8 != "cast" and len(held.shape) == 2), name
                expected = table[name].take(whole[name]) if name in table else whole[name]
                assert torch.equal(held.dense(torch.float32) if isinstance(held, Product) else held, expected), name

    def test_no_units_multiply_them(self, tmp_path, monkeypatch):
        monkeypatch.setattr("parallel_backend.loading.targets.has_fp8_units", lambda device: True)
        stored, _ = to_fp8_rows(flux2_tensors())
        layers = {name[: -len(".weight_scale")]: {"format": "float8_e4m3fn"} for name in stored if "_scale" in name}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        path = write(tmp_path / "model.safetensors", stored, metadata=metadata)
        model, _ = load(path, dtype=torch.bfloat16, fp8="matmul")
        held = [product for product in named_weights(model).values() if isinstance(product, Product)]
        assert held
        assert all(product.input_scale is None for product in held)

    @pytest.mark.parametrize("fp8", ["cast", "stored"])
    def test_a_scale_that_is_no_number(self, tmp_path, fp8):
        stored, _ = to_fp8_rows(flux2_tensors())
        stored["single_blocks.0.linear2.weight_scale"][7] = float("nan")
        with pytest.raises(ValueError, match=r"single_blocks\.0\.linear2\.weight_scale in .* not finite"):
            load(write(tmp_path / "model.safetensors", stored), fp8=fp8)

    @pytest.mark.parametrize("shape", [(255, 1), (1, 256), (256, 2), (257,)])
    def test_other_numbers_of_scales(self, tmp_path, shape):
        stored, _ = to_fp8_rows(flux2_tensors())
        stored["single_blocks.0.linear2.weight_scale"] = torch.ones(shape)
        words = rf"linear2\.weight_scale holds \d+ scales of the shape {re.escape(str(list(shape)))} for 256 rows"
        with pytest.raises(ValueError, match=rf"{words}.*with a scale a tensor or a row"):
            open_single_file(write(tmp_path / "model.safetensors", stored))


class TestBadFiles:
    """An error that names file and key."""

    def refused(self, path, message):
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert path.name in str(caught.value)

    def test_a_pickle(self, tmp_path):
        torch.save(flux2_tensors(), tmp_path / "model.ckpt")
        self.refused(tmp_path / "model.ckpt", r"is not a \.safetensors file.*pickled.*take the model in bf16")
        (tmp_path / "model.ckpt").rename(tmp_path / "model.safetensors")
        self.refused(tmp_path / "model.safetensors", "is not a safetensors file but a pickle.*take the model in bf16")

    def test_cut_off(self, tmp_path):
        path = write(tmp_path / "model.safetensors", flux2_tensors())
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - 100)
        self.refused(path, "was cut off or damaged; download it again")

    def test_another_model(self, tmp_path):
        path = write(tmp_path / "model.safetensors", {"something.weight": torch.ones(2, 2)})
        self.refused(
            path, r"no model that is known here \(1 tensors, such as something.weight\); supported are: FLUX\.2"
        )

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize(
        ("keys", "name"),
        [
            (["double_blocks.0.img_attn.qkv.weight"], "FLUX.1"),
            (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale"], "Chroma"),
            (
                [
                    "double_blocks.0.img_attn.qkv.weight",
                    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
                ],
                "HunyuanVideo or HunyuanImage",
            ),
            (["cap_embedder.1.weight"], "Lumina 2"),
            (["joint_blocks.0.context_block.attn.qkv.weight"], "Stable Diffusion 3"),
            (["input_blocks.0.0.weight", "label_emb.0.0.weight"], "SDXL"),
            (["input_blocks.0.0.weight"], "Stable Diffusion 1.5 or 2"),
            (["adaln_single.emb.timestep_embedder.linear_1.bias"], "LTX-Video"),
            ([*QWEN, "time_text_embed.addition_t_embedding.weight"], "Qwen-Image-Layered"),
            (["transformer_blocks.0.img_mod.1.qweight", "txt_norm.weight"], "an SVDQuant file (nunchaku)"),
            ([*QWEN, "controlnet_blocks.0.weight"], "a ControlNet"),
            ([*QWEN, "transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
            (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a LoRA"),
            (["shared.weight"], "the text encoder T5"),
        ],
    )
    def test_models_of_others_are_named(self, tmp_path, keys, name, prefix):
        path = write(tmp_path / "model.safetensors", {prefix + key: torch.ones(1) for key in keys})
        self.refused(
            path, f"looks like {re.escape(name)}, which is not supported here.*; supported are: FLUX.2 .*Qwen-"
        )

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize(
        ("ends", "name"),
        [
            (["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
             "a bitsandbytes file (nf4)"),
            (["weight", "weight.absmax", "weight.quant_state.bitsandbytes__fp4"], "a bitsandbytes file (fp4)"),
            (["weight", "SCB", "weight_format"], "a bitsandbytes file (int8)"),
            (["qweight", "wscales", "lora_down", "smooth"], "an SVDQuant file (nunchaku)"),
            (["qweight", "qzeros", "scales"], "a GPTQ or AWQ file"),
            (["weight._data", "weight._scale", "input_scale"], "a quanto file"),
            (["weight:_weight_qdata", "weight:_weight_scale"], "a torchao file"),
            (["W_q", "meta"], "an HQQ file"),
            (["weight", "scales", "biases"], "an MLX file"),
            (["encoded_exponent", "luts", "sign_mantissa"], "a DFloat11 file"),
        ],
    )  # fmt: skip
    def test_who_quantized_a_supported_model_is_named(self, tmp_path, ends, name, prefix):
        tensors = {f"{prefix}transformer_blocks.0.img_mod.1.{end}": torch.ones(4, dtype=torch.uint8) for end in ends}
        tensors |= {prefix + key: torch.ones(4) for key in QWEN if prefix + key not in tensors}
        path = write(tmp_path / "model.safetensors", tensors)
        words = rf"looks like {re.escape(name)}, which is not supported here: take the model in bf16, or in fp8 with a"
        for opener in (open_single_file, open_all_in_one):
            with pytest.raises(
                ValueError, match=rf"{words} scale .*, such as flux2_dev_fp8mixed\.safetensors or qwen_"
            ):
                opener(path)

    @pytest.mark.parametrize(("dtype", "what"), [("int8", "8-bit integers"), ("uint8", "packed numbers of 4 bits")])
    def test_numbers_that_nobody_names(self, tmp_path, dtype, what):
        stored, _ = to_fp8_rows(flux2_tensors())
        stored["single_blocks.0.linear2.weight"] = torch.ones(256, 1024).to(getattr(torch, dtype))
        self.refused(write(tmp_path / "model.safetensors", stored), rf"linear2\.weight in .*{what}.* take the model in")

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file"),
            (b"PK\3\4" + bytes(100), "a pickle of PyTorch"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
            (b"<!DOCTYPE html><html>", "a web page"),
        ],
    )
    def test_what_is_only_called_so(self, tmp_path, content, name):
        (tmp_path / "model.safetensors").write_bytes(content)
        self.refused(tmp_path / "model.safetensors", rf"\({len(content)} bytes\) is not a safetensors file but {name}")

    @pytest.mark.parametrize(
        ("key", "remedy"),
        [
            ("decoder.conv_in.weight", "a VAE, .*: Load VAE .Parallel. or ComfyUI.s own Load VAE loads it"),
            ("decoder.middle.0.residual.0.gamma", "a VAE, .*: Load VAE .Parallel. or ComfyUI.s own Load VAE loads it"),
            ("double_stream_modulation_img.linear.weight", "FLUX.2 by diffusers' names, .*: give its pipeline folder"),
        ],
    )
    def test_what_others_load_is_told(self, tmp_path, key, remedy):
        path = write(tmp_path / "model.safetensors", {key: torch.ones(1)})
        self.refused(path, f"looks like {remedy}")

    @pytest.mark.parametrize(("leaf", "family"), [("k_proj.bias", "Qwen-Image"), ("o_proj.weight", "FLUX.2")])
    def test_a_text_encoder(self, tmp_path, leaf, family):
        names = ["self_attn.q_proj.weight", "post_attention_layernorm.weight", f"self_attn.{leaf}"]
        path = write(tmp_path / "text.safetensors", {f"model.layers.0.{name}": torch.ones(1) for name in names})
        with pytest.raises(ValueError, match=rf"the text encoder of {family}, which Load CLIP \(Parallel\) loads"):
            open_single_file(path)

    def test_gguf(self, tmp_path):
        self.refused(
            tmp_path / "qwen-image-Q4_K_M.gguf",
            "is not a .safetensors file but a GGUF file.* take the model in bf16, or",
        )

    @pytest.mark.parametrize(
        "key",
        ["single_blocks.1.linear2.weight", "double_blocks.0.txt_attn.qkv.weight", "txt_in.weight",
         "double_blocks.1.img_attn.norm.key_norm.scale"],
    )  # fmt: skip
    def test_a_missing_tensor(self, tmp_path, key):
        tensors = flux2_tensors()
        del tensors[key]
        name = key.replace(".scale", ".weight")
        self.refused(write(tmp_path / "model.safetensors", tensors), rf"no tensor {re.escape(name)}.*incomplete")

    def test_a_missing_block(self, tmp_path):
        tensors = {name: t for name, t in flux2_tensors().items() if not name.startswith("single_blocks.1.")}
        self.refused(write(tmp_path / "model.safetensors", tensors), r"no tensors of single_blocks\.1;.*incomplete")

    def test_a_wrong_shape(self, tmp_path):
        tensors = flux2_tensors() | {"single_blocks.0.linear2.weight": torch.ones(256, 1000)}
        self.refused(
            write(tmp_path / "model.safetensors", tensors),
            r"single_blocks\.0\.linear2\.weight .*\[256, 1000\], but the rest of the file makes it \[256, 1024\]",
        )

    def test_a_wrong_dtype(self, tmp_path):
        tensors = flux2_tensors() | {"single_blocks.0.linear2.weight": torch.ones(256, 1024, dtype=torch.int8)}
        self.refused(
            write(tmp_path / "model.safetensors", tensors),
            r"single_blocks\.0\.linear2\.weight.* I8 \(8-bit integers\), which is not",
        )

    def test_another_quantization(self, tmp_path):
        metadata = {"_quantization_metadata": '{"layers": {"single_blocks.0.linear1": {"format": "svdquant_w4a4"}}}'}
        path = write(tmp_path / "model.safetensors", flux2_tensors(), metadata=metadata)
        self.refused(path, r"stores single_blocks\.0\.linear1 in the format svdquant_w4a4, which is not read")

    @pytest.mark.parametrize("name", ["svdquant_w4a4", "mxfp4", None])
    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    def test_another_quantization_that_a_tensor_tells_of(self, tmp_path, name, prefix):
        """Though the weight's dtype is one that is read."""
        stored, _ = to_fp8(flux2_tensors(), "comfy_quant")
        says = json.dumps({"format": name} if name else {}).encode()
        stored["single_blocks.0.linear1.comfy_quant"] = torch.tensor(list(says), dtype=torch.uint8)
        path = write(tmp_path / "model.safetensors", stored, prefix)
        self.refused(path, rf"stores single_blocks\.0\.linear1 in the format {name}, which is not read; take the model")

    @pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"{"])
    def test_a_tensor_that_should_be_json(self, tmp_path, text):
        stored, _ = to_fp8(flux2_tensors(), "comfy_quant")
        stored["single_blocks.0.linear1.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        path = write(tmp_path / "model.safetensors", stored)
        self.refused(path, r"single_blocks\.0\.linear1\.comfy_quant in .* is unreadable")

    @pytest.mark.parametrize("says", [torch.zeros(2), torch.zeros(2**16 + 1, dtype=torch.uint8)])
    def test_a_tensor_that_cannot_be_json(self, tmp_path, says):
        path = write(tmp_path / "model.safetensors", flux2_tensors() | {"single_blocks.0.linear1.comfy_quant": says})
        self.refused(path, r"single_blocks\.0\.linear1\.comfy_quant in .* is unreadable \(ValueError.* bytes of")

    def test_a_scale_of_a_dtype_that_is_not_read(self, tmp_path):
        stored, metadata = to_fp8(flux2_tensors(), "metadata")
        stored["single_blocks.0.linear2.weight_scale"] = torch.ones(1, dtype=torch.uint16)
        path = write(tmp_path / "model.safetensors", stored, metadata=metadata)
        self.refused(path, r"single_blocks\.0\.linear2\.weight_scale in .* is stored as U16, which is not read")

    def test_input_scales_of_parts_of_a_tensor(self, tmp_path):
        stored, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True)
        stored["single_blocks.0.linear2.input_scale"] = torch.ones(1024)
        path = write(tmp_path / "model.safetensors", stored, metadata=metadata)
        self.refused(path, r"single_blocks\.0\.linear2\.input_scale holds 1024 scales")

    @pytest.mark.parametrize("key", ["single_blocks.0.linear2.weight_scale", "single_blocks.0.linear2.input_scale"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_scale_that_is_no_number(self, tmp_path, key, value):
        stored, metadata = to_fp8(flux2_tensors(), "metadata", matmul=True)
        stored[key] = torch.tensor(value)
        path = write(tmp_path / "model.safetensors", stored, metadata=metadata)
        self.refused(path, rf"{re.escape(key)} in .* not finite")

    @pytest.mark.parametrize("table", ["[1]", "{", "{}", '{"layers": 3}', '{"layers": {"a": 1}}'])
    def test_unreadable_metadata(self, tmp_path, table):
        path = write(tmp_path / "model.safetensors", flux2_tensors(), metadata={"_quantization_metadata": table})
        self.refused(path, "has unreadable _quantization_metadata")

    def test_scales_of_parts_of_a_tensor(self, tmp_path):
        stored, metadata = to_fp8(flux2_tensors(), "metadata")
        stored["single_blocks.0.linear2.weight_scale"] = torch.ones(256, 32)
        path = write(tmp_path / "model.safetensors", stored, metadata=metadata)
        self.refused(path, r"single_blocks\.0\.linear2\.weight_scale holds 8192 scales")

    def test_a_tensor_with_other_dims(self, tmp_path):
        tensors = flux2_tensors() | {"img_in.weight": torch.ones(3)}
        self.refused(write(tmp_path / "model.safetensors", tensors), r"img_in has shape \[3\], where 2 dims")

    def test_values_that_are_no_numbers(self, tmp_path):
        tensors = flux2_tensors()
        tensors["single_blocks.2.linear1.weight"][5, 7] = float("nan")
        self.refused(write(tmp_path / "model.safetensors", tensors), r"single_blocks\.2\.linear1\.weight .*not finite")

    def test_unexpected_tensors(self, tmp_path):
        path = write(tmp_path / "model.safetensors", flux2_tensors() | {"vector_in.weight": torch.ones(2)})
        self.refused(path, r"vector_in\.weight in .*model\.safetensors: FLUX\.2 has no place for 1 tensor")

    def test_what_stands_beside_the_model_is_not_its_own(self, tmp_path):
        prefix = "model.diffusion_model."
        tensors = {prefix + name: tensor for name, tensor in flux2_tensors().items()}
        path = write(tmp_path / "model.safetensors", tensors | {"vae.decoder.conv_in.weight": torch.ones(2)})
        open_single_file(path)
