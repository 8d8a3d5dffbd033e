"""A text encoder in one file: recognised and checked from its header, and what other files are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_backend import ParallelismConfig
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.text_encoder_file import TextEncoderFile, open_text_encoder_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.parallel.products import Product, named_weights
from parallel_backend.runtime.group_config import ModelConfig
from tests.single_file import flux2_tensors, to_fp8_rows, write
from tests.text_encoder_file import HIDDEN, KINDS, VOCAB, tekken, text_tensors, write_text


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "mistral.safetensors")


@pytest.mark.parametrize("layers", [30, 40])
def test_the_configuration_is_read_off_the_shapes(tmp_path, layers):
    source = open_text_encoder_file(write_text(tmp_path / "mistral.safetensors", layers=layers, heads=3, kv_heads=1))
    model = source.family.needs_text_encoder().build(source.text_config)
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (HIDDEN, 3 * HIDDEN // 2, VOCAB)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (3, 1, 128)
    # Mistral-Small-3.2-24B's, which no shape tells.
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"], config.sliding_window) == (1e-5, 1e9, None)
    assert source.family.needs_text_encoder().layers(source.text_config) == (10, 20, 30)
    assert len(model.layers) == 30
    assert isinstance(model.norm, torch.nn.Identity)  # the hidden state after layer 30 of 40 is not normed
    assert set(source.weights("text_encoder")) >= {name for name, _ in model.named_parameters()}


def test_the_tokenizer_comes_along(file):
    assert open_text_encoder_file(file).read_tokenizer() == tekken()


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_opened_as_what_it_holds(tmp_path, kind):
    source = open_checkpoint(write_text(tmp_path / "mistral.safetensors", kind))
    assert isinstance(source, TextEncoderFile)
    assert source.components == ("text_encoder",)
    scales = [weight.scale for name, weight in source.text_weights.items() if name.endswith("up_proj.weight")]
    assert all((scale is None) == (kind in ("fp32", "bf16")) for scale in scales)


@pytest.mark.parametrize("fp8", ["cast", "stored"])
def test_scales_of_rows(tmp_path, fp8):
    stored, meant = to_fp8_rows(text_tensors(), part="proj")
    source = open_checkpoint(write(tmp_path / "mistral.safetensors", stored))
    model = source.family.needs_text_encoder().build(source.text_config)
    weights = source.weights("text_encoder")
    load_weights(model, weights, {}, device=torch.device("cpu"), dtype=torch.float32, fp8=fp8)
    for name, held in named_weights(model).items():
        assert (held.dtype == torch.float8_e4m3fn) == (fp8 == "stored" and "proj" in name), name
        dense = held.dense(torch.float32) if isinstance(held, Product) else held
        assert torch.equal(dense, meant[f"model.{name}"]), name


def test_any_layout_will_do(file):
    for layout in (ParallelismConfig(tp_size=3), ParallelismConfig(ulysses_size=7)):
        assert ModelConfig.create(file, layout, "cpu").layout == layout


def test_a_changed_file_is_another(tmp_path, file):
    first = open_text_encoder_file(file).fingerprint()
    assert open_text_encoder_file(write_text(tmp_path / "other.safetensors", kv_heads=1)).fingerprint() != first


class TestRefused:
    def refused(self, path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            open_text_encoder_file(path)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
            ("text_model.encoder.layers.0.self_attn.q_proj.weight", "CLIP"),
            ("model.layers.0.self_attn.q_norm.weight", r"Qwen3 \(of FLUX.2 klein and Z-Image\)"),
            ("model.layers.0.pre_feedforward_layernorm.weight", "Gemma"),
            ("double_blocks.0.img_attn.qkv.weight", "the diffusion model FLUX.1"),
            ("decoder.conv_in.weight", "a VAE"),
            ("text_model.encoder.layers.0.mlp.fc1.lora_up.weight", "a LoRA"),
        ],
    )
    def test_other_models_are_named(self, tmp_path, key, name):
        tensors = {key: torch.ones(4), "model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}
        tensors["model.layers.0.post_attention_layernorm.weight"] = torch.ones(2)
        if not key.startswith("model."):
            tensors = {key: torch.ones(4)}
        self.refused(
            write(tmp_path / "other.safetensors", tensors),
            f"looks like {name}, which is not supported here.*supported are: FLUX.2: Mistral 3 small.*Qwen-Image: Qwen",
        )

    @pytest.mark.parametrize(
        ("end", "name"),
        [("weight.quant_state.bitsandbytes__nf4", "a bitsandbytes file"), ("qzeros", "a GPTQ or AWQ file")],
    )
    def test_who_quantized_a_supported_one_is_named(self, tmp_path, end, name):
        tensors = {**text_tensors(), f"model.layers.0.self_attn.q_proj.{end}": torch.ones(4, dtype=torch.uint8)}
        path = write(tmp_path / "other.safetensors", tensors)
        self.refused(path, f"looks like {name}.* take the model in bf16, or .*, such as mistral_3_small_flux2_fp8")

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize(
        ("keys", "family"),
        [
            (["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"], "FLUX.2"),
            (["txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"], "Qwen-Image"),
        ],
    )
    def test_diffusion_models(self, tmp_path, keys, family, prefix):
        path = write(tmp_path / "model.safetensors", {prefix + key: torch.ones(1) for key in keys})
        self.refused(path, rf"the transformer of {family}, which Load Diffusion Model \(Parallel\) loads")

    def test_anything_else(self, tmp_path):
        self.refused(write(tmp_path / "other.safetensors", {"a": torch.ones(1)}), "has 1 tensors, which is no text enc")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model.embed_tokens.weight": None}, r"there is no tensor model\.embed_tokens\.weight"),
            ({"model.layers.7.mlp.down_proj.weight": None}, r"no tensor model\.layers\.7\.mlp\.down_proj\.weight"),
            (
                {"model.layers.3.mlp.up_proj.weight": torch.ones(5, HIDDEN)},
                r"shape \[5, 64\], but the rest of .* it \[96, 64\]",
            ),
            ({"model.layers.3.mlp.up_proj.weight": torch.ones(96, HIDDEN).int()}, r"is stored as I32"),
            ({"model.layers.0.self_attn.q_proj.weight": torch.ones(100, HIDDEN)}, "no heads of 128"),
            ({"model.layers.0.self_attn.q_proj.weight": torch.ones(256)}, "where 2 dims are expected"),
            ({"tekken_model": None}, "has no tokenizer"),
            ({"tekken_model": torch.ones(3)}, "has no tokenizer"),
            (
                {"model.layers.29.mlp.gate.weight": torch.ones(3)},
                r"layers\.29\.mlp\.gate\.weight in .* no place",
            ),
        ],
    )
    def test_damaged_files(self, tmp_path, changes, message):
        tensors = text_tensors() | changes
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.refused(write(tmp_path / "mistral.safetensors", tensors), message)

    def test_a_layer_that_is_missing_as_a_whole(self, tmp_path):
        tensors = {name: tensor for name, tensor in text_tensors().items() if ".layers.12." not in name}
        self.refused(write(tmp_path / "mistral.safetensors", tensors), r"no tensors of model\.layers\.12, of 30 layers")

    def test_a_file_that_was_cut_off(self, tmp_path, file):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(file.read_bytes()[:-10])
        self.refused(path, "it was cut off or damaged")

    def test_a_pickle(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save(text_tensors(), path)
        self.refused(path, "is not a .safetensors file")

    def test_a_quantization_that_is_not_read(self, tmp_path, file):
        tensors = load_file(file)
        says = json.dumps({"format": "svdquant_w4a4"}).encode()
        tensors["model.layers.0.mlp.up_proj.comfy_quant"] = torch.tensor(list(says), dtype=torch.uint8)
        path = tmp_path / "svdquant.safetensors"
        save_file(tensors, path)
        self.refused(path, r"model\.layers\.0\.mlp\.up_proj in the format svdquant_w4a4")

    def test_layers_beyond_those_that_are_used_do_not_matter(self, tmp_path):
        tensors = text_tensors(layers=40) | {"model.layers.35.other.weight": torch.ones(2)}
        tensors["lm_head.weight"] = torch.ones(VOCAB, HIDDEN)
        open_text_encoder_file(write(tmp_path / "mistral.safetensors", tensors))

    def test_a_final_norm_in_a_file_that_ends_after_the_layers_that_are_used(self, tmp_path):
        # ComfyUI leaves it out: it is that of a model with more layers.
        tensors = text_tensors() | {"model.norm.weight": torch.ones(HIDDEN)}
        source = open_text_encoder_file(write(tmp_path / "mistral.safetensors", tensors))
        assert isinstance(source.family.needs_text_encoder().build(source.text_config).norm, torch.nn.Identity)

    def test_a_transformer_is_no_text_encoder_and_the_other_way_round(self, tmp_path, file):
        path = write(tmp_path / "flux2.safetensors", flux2_tensors())
        assert open_checkpoint(path).components == ("transformer",)
        assert open_checkpoint(file).components == ("text_encoder",)
