"""Z-Image's file: diffusers' own conversion is the oracle; what is not whole or another model is refused."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_name, family_of_pipeline
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.text_encoder_file import open_text_encoder_file
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.products import product_of
from parallel_backend.parallel.tensor import apply_tensor_parallel
from tests.single_file import to_fp8, write
from tests.z_image_file import z_image_model, z_image_tensors

SMALL = {"dim": 96, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [4, 6, 6], "cap_feat_dim": 40}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return z_image_model(**SMALL)


@pytest.fixture
def tensors(model):
    return z_image_tensors(model)


def load(path, dtype=torch.float32, fp8="cast", axis=None):
    source = open_single_file(path)
    kind = source.family.transformer
    model = kind.build(source.transformer_config)
    table = apply_tensor_parallel(model, kind.plan(source.transformer_config), axis) if axis else {}
    load_weights(model, source.weights("transformer"), table, device=CPU, dtype=dtype, fp8=fp8)
    return model


def parameters_of(model):
    return dict(model.named_parameters())


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float32), ("model.diffusion_model.", torch.bfloat16)])
def test_a_file_gives_the_model_that_it_was_written_from(tmp_path, model, tensors, prefix, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path = write(tmp_path / "z_image.safetensors", {**stored, "norm_final.weight": torch.ones(96)}, prefix)
    expected, actual = parameters_of(model), parameters_of(load(path))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor.to(dtype).float()) for name, tensor in expected.items())


def test_every_parameter_is_what_diffusers_makes_of_the_file(tmp_path, tensors):
    expected = convert_z_image_transformer_checkpoint_to_diffusers(dict(tensors))
    actual = parameters_of(load(write(tmp_path / "z_image.safetensors", tensors)))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_the_configuration_is_that_of_the_shapes(tmp_path, model, tensors):
    source = open_single_file(write(tmp_path / "z_image.safetensors", tensors))
    assert source.family is family_of_name("Z-Image-Turbo")
    for name, value in source.transformer_config.items():
        assert value == model.config[name], name
    with pytest.raises(ValueError, match="6 attention heads, which do not divide by tp x ulysses = 4"):
        source.check(ParallelismConfig(tp_size=4))


@pytest.mark.parametrize("layout", ["metadata", "comfy_quant", "scaled_fp8"])
@pytest.mark.parametrize("fp8", ["cast", "stored"])
def test_fp8(tmp_path, model, tensors, layout, fp8):
    stored, metadata = to_fp8(tensors, layout, part="layers.")
    path = write(tmp_path / "fp8.safetensors", stored, metadata=metadata)
    whole = load(path)
    for name, parameter in parameters_of(model).items():
        in_fp8 = name.startswith("layers.") and parameter.ndim == 2
        error = (parameters_of(whole)[name] - parameter).abs().max() / parameter.abs().max()
        assert (1e-3 if in_fp8 else 0) <= error < (0.05 if in_fp8 else 0.01), name
    # A third of the heads. The MLP's 256 features do not divide over three: this rank has 80 of them.
    part = load(path, fp8=fp8, axis=Axis(None, 3, 1)).layers[1]
    assert product_of(part.attention.to_q).dtype == (torch.float32 if fp8 == "cast" else torch.float8_e4m3fn)
    x = torch.randn(2, 96)
    for ours, theirs, rows in (
        (part.attention.to_q, whole.layers[1].attention.to_q, slice(32, 64)),
        (part.feed_forward.w1, whole.layers[1].feed_forward.w1, slice(96, 176)),
    ):
        assert torch.allclose(ours(x), theirs(x)[:, rows], atol=1e-5)


class TestRefused:
    def refused(self, path, message):
        with pytest.raises(ValueError, match=message) as caught:
            open_single_file(path)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize(
        "key",
        ["layers.1.attention.qkv.weight", "noise_refiner.0.attention.q_norm.weight", "layers.0.attention.q_norm.weight",
         "context_refiner.1.ffn_norm2.weight", "x_pad_token", "final_layer.linear.bias", "cap_embedder.1.weight"],
    )  # fmt: skip
    def test_a_missing_tensor(self, tmp_path, tensors, key):
        del tensors[key]
        self.refused(write(tmp_path / "z.safetensors", tensors), rf"no tensor {re.escape(key)}.*incomplete")

    def test_a_missing_block(self, tmp_path, tensors):
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.0.")}
        self.refused(write(tmp_path / "z.safetensors", kept), r"no tensors? .*layers\.0.*incomplete")

    @pytest.mark.parametrize(
        ("key", "message"),
        [("siglip_embedder.0.weight", "this is Z-Image-Omni, which is not supported; Z-Image and Z-Image-Turbo are"),
         ("dec_net.cond_embed.weight", "this is Z-Image in pixel space, which is not supported")],
    )  # fmt: skip
    def test_its_relatives(self, tmp_path, tensors, key, message):
        self.refused(write(tmp_path / "z.safetensors", {**tensors, key: torch.ones(2, 2)}), message)

    def test_lumina_2(self, tmp_path, tensors):
        for token in ("x_pad_token", "cap_pad_token"):
            del tensors[token]
        self.refused(
            write(tmp_path / "l.safetensors", tensors), r"looks like Lumina 2,.*supported are: .*Z-Image-Turbo"
        )

    def test_diffusers_names(self, tmp_path, model):
        self.refused(
            write(tmp_path / "z.safetensors", model.state_dict()),
            "looks like Z-Image by diffusers' names, .*: take the file that ComfyUI's templates name",
        )

    def test_other_shapes(self, tmp_path, tensors):
        tensors["x_embedder.weight"] = torch.ones(96, 128)
        self.refused(write(tmp_path / "z.safetensors", tensors), "its tokens have 128 features,.*Z-Image has 64")

    def test_a_pipeline_folder(self):
        with pytest.raises(
            ValueError, match=r"ZImagePipeline are not read.*file with Load Diffusion Model \(Parallel\)"
        ):
            family_of_pipeline("ZImagePipeline")

    def test_its_text_encoder(self, tmp_path):
        path = write(tmp_path / "qwen_3_4b.safetensors", {"model.layers.0.self_attn.q_norm.weight": torch.ones(2)})
        with pytest.raises(ValueError, match=r"Qwen3 \(of FLUX.2 klein and Z-Image\),.*: ComfyUI's own Load CLIP"):
            open_text_encoder_file(path)
