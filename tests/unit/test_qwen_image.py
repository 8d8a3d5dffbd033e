"""Qwen-Image without processes: its files, its positions, and what becomes of latents."""

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, family_of_transformer
from parallel_backend.families.qwen_image.positions import RotaryPositions, placed_by_comfyui, placed_by_diffusers
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.pipeline_folder import open_pipeline_folder
from parallel_backend.mesh import SINGLE, Axis, ParallelMesh
from parallel_backend.parallel.sequence import SequenceShards
from tests.tiny_qwen import make_tiny_qwen, single_file_tensors, tiny_transformer

QWEN = family_of_transformer("QwenImageTransformer2DModel")


@pytest.fixture(scope="module")
def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Two heads of 128, as ComfyUI's files have them, and a vision tower of one block."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=50, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        vision_config=dict(depth=1, hidden_size=160, intermediate_size=32, num_heads=2, out_hidden_size=256),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture
def file(tmp_path, text_encoder):
    """As ComfyUI has it."""
    tensors = {
        name.replace("language_model.", "").replace("model.visual", "visual"): tensor.bfloat16()
        for name, tensor in text_encoder.state_dict().items()
    }
    save_file(tensors, tmp_path / "qwen_2.5_vl_7b.safetensors")
    return tmp_path / "qwen_2.5_vl_7b.safetensors"


def rewrite(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class TestTextEncoderFile:
    def test_configuration(self, file, text_encoder):
        source = open_checkpoint(file)
        assert source.family is QWEN
        assert source.components == ("text_encoder", "vision_tower")
        read, true = Qwen2_5_VLConfig(**source.text_config), text_encoder.config
        for part, names in {
            "text_config": ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
                            "num_attention_heads", "num_key_value_heads", "rope_parameters"],
            "vision_config": ["depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size",
                              "patch_size", "window_size", "fullatt_block_indexes", "spatial_merge_size"],
        }.items():  # fmt: skip
            for name in names:
                ours, theirs = getattr(getattr(read, part), name), getattr(getattr(true, part), name)
                assert (list(ours) if isinstance(theirs, tuple) else ours) == (
                    list(theirs) if isinstance(theirs, tuple) else theirs
                ), name
        assert len(source.text_weights) == len(list(text_encoder.model.language_model.parameters()))
        assert len(source.vision_weights) == len(list(text_encoder.model.visual.parameters()))

    def test_without_a_vision_tower(self, file):
        rewrite(file, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("visual.")])
        assert open_checkpoint(file).components == ("text_encoder",)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            (
                "model.layers.1.mlp.up_proj.weight",
                None,
                r"no tensor model.layers.1.mlp.up_proj.weight; the",
            ),
            (
                "visual.blocks.0.attn.proj.bias",
                None,
                r"no tensor visual.blocks.0.attn.proj.bias; the",
            ),
            (
                "model.norm.weight",
                torch.ones(3),
                r"model.norm.weight has shape \[3\], but the rest of",
            ),
            ("model.layers.0.self_attn.k_proj.weight", torch.ones(60, 256), "256 query and 60 key features, which are"),
            (
                "visual.merger.mlp.2.weight",
                torch.ones(4),
                r"has shape \[4\], where 2 dims are expected",
            ),
        ],
    )
    def test_damaged(self, file, name, tensor, message):
        rewrite(file, lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor}))
        with pytest.raises(ValueError, match=message):
            open_checkpoint(file)


class TestTransformerFile:
    @pytest.mark.parametrize("at_zero", [False, True])
    def test_configuration(self, tmp_path, at_zero):
        model = tiny_transformer(zero_cond_t=at_zero)
        save_file(dict(single_file_tensors(model)), tmp_path / "qwen.safetensors")
        config = open_checkpoint(tmp_path / "qwen.safetensors").transformer_config
        for name, value in config.items():
            assert list(value) == list(model.config[name]) if name == "axes_dims_rope" else value == model.config[name]
        with pytest.raises(ValueError, match="8 attention heads, which do not divide by tp x ulysses = 3"):
            QWEN.transformer.check_layout(config, ParallelismConfig(tp_size=3))

    def test_layered_is_refused(self, tmp_path):
        tensors = dict(single_file_tensors(tiny_transformer(use_additional_t_cond=True, num_layers=1)))
        save_file(tensors, tmp_path / "layered.safetensors")
        with pytest.raises(ValueError, match="Qwen-Image-Layered"):
            open_checkpoint(tmp_path / "layered.safetensors")

    def test_a_missing_block(self, tmp_path):
        tensors = dict(single_file_tensors(tiny_transformer()))
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("transformer_blocks.1.")}
        save_file(kept, tmp_path / "qwen.safetensors")
        with pytest.raises(ValueError, match=r"there are no tensors of transformer_blocks\.1; the file is incomplete"):
            open_checkpoint(tmp_path / "qwen.safetensors")


def test_the_folder_of_another_text_encoder(tmp_path):
    folder = make_tiny_qwen(tmp_path / "qwen")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("Qwen2_5_VLForConditionalGeneration", "T5EncoderModel"))
    with pytest.raises(ValueError, match="Qwen-Image needs a Qwen2_5_VLForConditionalGeneration"):
        open_pipeline_folder(folder)


class TestPositions:
    @pytest.mark.parametrize("shapes", [[(1, 4, 6)], [(1, 5, 3), (1, 2, 7)], [(1, 1, 1), (1, 3, 4), (1, 8, 2)]])
    def test_diffusers(self, shapes):
        axes, text = (4, 14, 14), 5
        theirs = QwenEmbedRope(theta=10000, axes_dim=list(axes), scale_rope=True)
        image, words = theirs([shapes], max_txt_seq_len=text, device=torch.device("cpu"))
        shards = SequenceShards(ParallelMesh(*[SINGLE] * 5, "cpu"))
        shards.begin([text, len(image)])
        ours = RotaryPositions(axes)
        ours.place(placed_by_diffusers(shapes, False), tuple(range(text)), shards, torch.device("cpu"))
        cos, sin = ours()
        for part, function in ((cos, torch.Tensor.cos), (sin, torch.Tensor.sin)):
            expected = function(torch.cat([words, image]).angle()).repeat_interleave(2, dim=1)
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)

    def test_comfyui_differs_on_odd_sides_alone(self):
        even, odd = [(1, 8, 4), (1, 4, 4)], [(1, 6, 4)]
        tokens = [(1, 4, 2), (1, 2, 2)]
        assert placed_by_comfyui(even, "index") == placed_by_diffusers(tokens, False)
        ours, theirs = placed_by_comfyui(odd, "index").grids[0], placed_by_diffusers([(1, 3, 2)], False).grids[0]
        assert (ours.row, theirs.row) == (-1, -2)

    def test_text_masks_make_embeddings_of_their_own(self):
        shards = SequenceShards(ParallelMesh(*[SINGLE] * 5, "cpu"))
        shards.begin([2, 4])
        ours, placement = RotaryPositions((4, 14, 14)), placed_by_diffusers([(1, 2, 2)], False)
        ours.place(placement, (0, 1), shards, torch.device("cpu"))
        first = ours()[0]
        ours.place(placement, (0, 3), shards, torch.device("cpu"))
        assert torch.equal(first[0], ours()[0][0])
        assert not torch.equal(first[1], ours()[0][1])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_latents_to_tokens_and_back(size):
    x = torch.randn(2, 16, 1, *size)
    inputs = QWEN.transformer.inputs(
        x, torch.ones(2), Conditioning(torch.zeros(2, 3, 8), [torch.randn(1, 16, 1, 3, 4)])
    )
    rows, columns = ((side + 1) // 2 for side in size)
    assert inputs["hidden_states"].shape == (2, rows * columns + 4, 64)
    assert torch.equal(QWEN.transformer.prediction(inputs["hidden_states"], x), x)


def test_a_reference_batch_that_does_not_fit():
    conditioning = Conditioning(torch.zeros(2, 3, 8), [torch.zeros(3, 16, 1, 4, 4)])
    with pytest.raises(ValueError, match="a reference batch of 3 does not fit a batch of 2"):
        QWEN.transformer.inputs(torch.zeros(2, 16, 1, 4, 4), torch.ones(2), conditioning)


def test_text_over_ranks_that_heads_do_not_divide_by():
    """28 query and 4 kv heads over 8 ranks: 4 and 3 heads in turn, and every feature is held once."""
    config = QWEN.reference_model.text_config
    assert [QWEN.needs_text_encoder().degree(config, ranks) for ranks in (1, 2, 3, 4, 6, 8)] == [1, 2, 1, 4, 2, 8]
    query, key = (QWEN.needs_text_encoder().plan(config)[f"layers.*.self_attn.{name}_proj"] for name in "qk")
    held = [query.ranges(3584, Axis(None, 8, rank))[0] for rank in range(8)]
    assert [(last - first) // 128 for first, last in held] == [4, 3] * 4
    assert [first for first, _ in held[1:]] == [last for _, last in held[:-1]]
    assert [key.ranges(512, Axis(None, 8, rank))[0] for rank in range(4)] == [(0, 128)] * 2 + [(128, 256)] * 2
