"""All-in-one checkpoints: each part is read as a file of its own would be, and nothing in them is passed over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel_backend import ParallelismConfig
from parallel_backend.loading.all_in_one import open_all_in_one, text_encoder_names
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.text_encoder_file import open_text_encoder_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.parallel.products import named_weights, stored_tensors
from parallel_backend.runtime.group_config import ModelConfig
from tests.all_in_one import KINDS, MODEL, TEXT, VAE, write_flux2
from tests.single_file import flux2_tensors, to_fp8, write
from tests.text_encoder_file import tekken, text_tensors, text_to_fp8
from tests.tiny_qwen import single_file_tensors, tiny_text_encoder, tiny_transformer


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_flux2(tmp_path_factory.mktemp("made") / "all.safetensors")


def spoil(file, tmp_path, remove=(), **add):
    """A copy without the keys that begin so, and with others."""
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(tuple(remove) or "\0")}
    save_file({**tensors, **add}, tmp_path / "spoiled.safetensors")
    return tmp_path / "spoiled.safetensors"


def loaded(source, component, fp8):
    family = source.family
    if component == "transformer":
        model = family.transformer.build(source.transformer_config)
    else:
        model = family.needs_text_encoder().build(source.text_config)
    load_weights(model, source.weights(component), {}, device=torch.device("cpu"), dtype=torch.float32, fp8=fp8)
    return model


@pytest.mark.parametrize("fp8", ["cast", "matmul"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_files_of_their_own(tmp_path, kind, fp8):
    path = write_flux2(tmp_path / "all.safetensors", kind)
    text = text_tensors()
    for component, tensors, convert in (
        ("transformer", flux2_tensors(heads=4), to_fp8), ("text_encoder", text, text_to_fp8)
    ):  # fmt: skip
        stored, metadata = (tensors, None) if kind == "fp32" else convert(tensors, kind)
        own = open_checkpoint(write(tmp_path / f"{component}.safetensors", stored, metadata=metadata))
        part = open_checkpoint(path, "" if component == "transformer" else component)
        assert part.components == own.components == (component,)
        expected = loaded(own, component, fp8)
        actual = loaded(part, component, fp8)
        assert named_weights(actual).keys() == named_weights(expected).keys()
        for a, b in zip(stored_tensors(actual), stored_tensors(expected), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def test_what_is_in_it(file):
    found = open_all_in_one(file)
    assert (found.prefix, found.text_prefix) == (MODEL, TEXT)
    stored = load_file(file)
    vae = found.read(found.keys(VAE))
    assert vae.keys() == {key for key in stored if key.startswith(VAE)}
    assert all(torch.equal(tensor, stored[key]) for key, tensor in vae.items())
    assert open_checkpoint(file, "text_encoder").read_tokenizer() == tekken()


def test_qwen_image(tmp_path):
    """Its text encoder has a vision tower, and ComfyUI has its tokenizer."""
    transformer = {MODEL + key: tensor for key, tensor in single_file_tensors(tiny_transformer()).items()}
    made = tiny_text_encoder(50, lambda token: len(token))
    prefix = "text_encoders.qwen25_7b.transformer."
    text = {
        prefix + name.replace("language_model.", "").replace("model.visual", "visual"): tensor
        for name, tensor in made.state_dict().items()
    }
    path = write(tmp_path / "qwen.safetensors", {**transformer, **text, "vae.conv1.weight": torch.ones(2)})
    found = open_all_in_one(path)
    assert (found.transformer.family.name, found.text_prefix) == ("qwen_image", prefix)
    assert found.keys(VAE) == ["vae.conv1.weight"]


def test_parts_are_models_of_their_own(file):
    """Equal but for the part, they may not be taken for each other."""
    model = ModelConfig.create(file, ParallelismConfig(), "cpu")
    text = replace(model, part="text_encoder")
    assert model != text
    assert model.group == text.group


class TestParts:
    @pytest.mark.parametrize("removed", ["text_encoders.", "vae."])
    def test_a_part_that_is_not_there(self, file, tmp_path, removed):
        found = open_all_in_one(spoil(file, tmp_path, [removed]))
        assert bool(found.text_prefix) == (removed != "text_encoders.")
        assert bool(found.keys(VAE)) == (removed != "vae.")

    def test_a_transformer_alone(self, tmp_path):
        found = open_all_in_one(write(tmp_path / "model.safetensors", flux2_tensors()))
        assert (found.prefix, found.text_prefix, found.keys(VAE)) == ("", "", [])

    @pytest.mark.parametrize(
        "key",
        ["cond_stage_model.a.weight", "first_stage_model.b", "model_ema.c", "clip_vision.d", "text_encoders.other.e",
         "text_encoders.spiece_model",
         "text_encoders.mistral3_24b.text_projection.weight"],
    )  # fmt: skip
    def test_something_else(self, file, tmp_path, key):
        path = spoil(file, tmp_path, **{key: torch.ones(2)})
        with pytest.raises(ValueError, match=rf"{key} in \S*spoiled\.safetensors: .* no place for 1 tensor"):
            open_all_in_one(path)

    def test_something_in_the_transformer(self, file, tmp_path):
        path = spoil(file, tmp_path, **{f"{MODEL}vector_in.weight": torch.ones(2)})
        with pytest.raises(ValueError, match=r"vector_in\.weight in .* no place for 1 tensor"):
            open_all_in_one(path)

    def test_something_in_the_text_encoder(self, file, tmp_path):
        path = spoil(file, tmp_path, **{f"{TEXT}model.layers.3.self_attn.k_proj.bias": torch.ones(2)})
        with pytest.raises(ValueError, match=r"layers\.3\.self_attn\.k_proj\.bias in .* no place for 1 tensor"):
            open_checkpoint(path, "text_encoder")

    def test_several_text_encoders(self, file, tmp_path):
        path = spoil(file, tmp_path, **{"text_encoders.clip_l.transformer.a.weight": torch.ones(2)})
        with pytest.raises(ValueError, match=r"2 text encoders \(clip_l, mistral3_24b\)"):
            open_all_in_one(path)

    @pytest.mark.parametrize(
        "keys",
        [["t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"],
         ["clip_l.transformer.text_model.a", "t5xxl.transformer.shared.weight"]],
    )  # fmt: skip
    def test_text_encoders_that_the_family_does_not_have(self, file, tmp_path, keys):
        """They are ComfyUI's own, however many; the workers have none of them."""
        path = spoil(file, tmp_path, ["text_encoders."], **{f"text_encoders.{key}": torch.ones(2, 2) for key in keys})
        found = open_all_in_one(path)
        assert found.text_prefix == ""
        assert text_encoder_names(found.stored) == [key.partition(".")[0] for key in keys]
        words = "looks like T5" if len(keys) == 1 else "has 2 text encoders"
        with pytest.raises(ValueError, match=words):
            open_checkpoint(path, "text_encoder")

    @pytest.mark.parametrize("removed", [f"{MODEL}single_blocks.1.linear2", f"{TEXT}model.layers.4.mlp.up_proj"])
    def test_a_tensor_that_is_missing(self, file, tmp_path, removed):
        path = spoil(file, tmp_path, [removed])
        with pytest.raises(ValueError, match="there is no tensor"):
            open_all_in_one(path) if removed.startswith(MODEL) else open_checkpoint(path, "text_encoder")

    def test_no_tokenizer(self, file, tmp_path):
        with pytest.raises(ValueError, match="has no tokenizer"):
            open_text_encoder_file(spoil(file, tmp_path, ["text_encoders.tekken_model"]), in_checkpoint=True)

    def test_a_format_of_another_part(self, tmp_path):
        """The text encoder's is not read; the transformer alone is, and only of the text encoder is it said."""
        path = write_flux2(tmp_path / "all.safetensors", "metadata")
        tensors = load_file(path)
        layers = '{"layers": {"%smodel.layers.3.mlp.up_proj": {"format": "w3a3"}}}' % TEXT  # noqa: UP031
        save_file(tensors, path, metadata={"_quantization_metadata": layers})
        assert open_checkpoint(path).components == ("transformer",)
        with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.up_proj in the format w3a3"):
            open_checkpoint(path, "text_encoder")
