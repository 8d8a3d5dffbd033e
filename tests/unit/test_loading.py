"""Pipeline folders and weight files: what is whole loads exactly, what is not is refused with the name of the file."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Mistral3ForConditionalGeneration

from parallel_backend import ParallelismConfig
from parallel_backend.loading.pipeline_folder import open_pipeline_folder
from parallel_backend.loading.safetensors_reader import index_folder, read_header, whole
from parallel_backend.loading.weight_loader import load_weights
from parallel_backend.mesh import Axis
from parallel_backend.parallel.tensor import apply_tensor_parallel
from parallel_backend.runtime.rank.engine import Engine

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
COMPONENT = pytest.mark.parametrize("component", WEIGHTS)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_pipeline, tmp_path) -> Path:
    """A copy of the pipeline folder that a test may damage."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


@pytest.fixture
def sharded(tiny_pipeline, tmp_path) -> Path:
    """The transformer in several files with an index, as big models are stored; written by diffusers."""
    model = Flux2Transformer2DModel.from_pretrained(tiny_pipeline / "transformer")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def load_transformer(folder: Path, pipeline: Path, axis: Axis | None = None):
    """Load the transformer's weights in ``folder`` under the configuration of ``pipeline``."""
    source = open_pipeline_folder(pipeline)
    model = source.family.transformer.build(source.transformer_config)
    plan = source.family.transformer.plan(source.transformer_config)
    table = apply_tensor_parallel(model, plan, axis) if axis else {}
    weights = {name: whole(tensor) for name, tensor in index_folder(folder).items()}
    held = load_weights(model, weights, table, device=CPU, dtype=torch.float32)
    return model, table, held


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def load(folder: Path) -> Engine:
    """Load the whole pipeline as one rank does."""
    engine = Engine(CPU)
    engine.load("model", str(folder), ParallelismConfig(), torch.float32, lambda done, total: None)
    return engine


class TestWhole:
    """What is whole is accepted and loaded as diffusers and transformers load it."""

    def test_the_folder_says_what_it_is(self, tiny_pipeline):
        source = open_pipeline_folder(tiny_pipeline)
        source.check(ParallelismConfig(ulysses_size=4, tp_size=2))
        assert source.family.name == "flux2"
        assert source.transformer_config["num_attention_heads"] == 8
        for component, file in WEIGHTS.items():
            tensors = load_file(tiny_pipeline / component / file)
            found = index_folder(tiny_pipeline / component)
            assert {name: entry.shape for name, entry in found.items()} == {
                k: tuple(v.shape) for k, v in tensors.items()
            }
            assert {name: entry.nbytes for name, entry in found.items()} == {k: v.nbytes for k, v in tensors.items()}

    def test_every_tensor_is_what_diffusers_loads(self, tiny_pipeline):
        engine = load(tiny_pipeline)
        transformer = Flux2Transformer2DModel.from_pretrained(tiny_pipeline / "transformer")
        actual = dict(engine.models["model"].components["transformer"].module.named_parameters())
        for name, parameter in transformer.named_parameters():
            assert torch.equal(actual.pop(name), parameter), name
        assert not actual
        assert engine.models["model"].components["transformer"].nbytes == sum(
            p.nbytes for p in transformer.parameters()
        )

    def test_the_text_encoder_has_just_the_layers_that_are_used(self, tiny_pipeline):
        engine = load(tiny_pipeline)
        encoder = Mistral3ForConditionalGeneration.from_pretrained(tiny_pipeline / "text_encoder").model.language_model
        full = dict(encoder.named_parameters())
        actual = dict(engine.models["model"].components["text_encoder"].module.named_parameters())
        assert set(actual) == {
            name for name in full if not name.startswith("layers.4.") and name != "norm.weight"
        }  # layers 1, 2 and 4 of 5 are read: the fifth layer and the last norm are not
        for name, parameter in actual.items():
            assert torch.equal(parameter, full[name]), name

    def test_several_files_with_an_index(self, sharded, tiny_pipeline):
        model, _, held = load_transformer(sharded, tiny_pipeline)
        full = load_file(tiny_pipeline / "transformer" / WEIGHTS["transformer"])
        assert held == sum(tensor.nbytes for tensor in full.values())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, full[name]), name

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_rank_reads_its_slices(self, sharded, tiny_pipeline, rank):
        model, table, held = load_transformer(sharded, tiny_pipeline, Axis(None, 2, rank))
        full = load_file(tiny_pipeline / "transformer" / WEIGHTS["transformer"])
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, table[name].take(full[name]) if name in table else full[name]), name
        halved = sum(full[name].nbytes for name in table)
        assert halved > 0.9 * sum(tensor.nbytes for tensor in full.values())
        assert held == sum(tensor.nbytes for tensor in full.values()) - halved // 2

    def test_weights_do_not_lean_on_the_file(self, folder):
        model, _, _ = load_transformer(folder / "transformer", folder)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        file = folder / "transformer" / WEIGHTS["transformer"]
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name

    def test_the_dtype_asked_for(self, tiny_pipeline):
        source = open_pipeline_folder(tiny_pipeline)
        model = source.family.transformer.build(source.transformer_config)
        told = []
        weights = source.weights("transformer")
        held = load_weights(model, weights, {}, device=CPU, dtype=torch.bfloat16, on_bytes=told.append)
        full = load_file(tiny_pipeline / "transformer" / WEIGHTS["transformer"])
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, full[name].bfloat16()), name
        assert held == sum(told) == sum(tensor.nbytes for tensor in full.values()) // 2


class TestFolder:
    """What is missing in a folder, or is not what it should be."""

    def test_not_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'none'} is not a folder")):
            open_pipeline_folder(tmp_path / "none")

    def test_a_file_is_not_a_folder(self, tiny_pipeline):
        with pytest.raises(ValueError, match="is not a folder"):
            open_pipeline_folder(tiny_pipeline / "model_index.json")

    def test_no_model_index(self, tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'model_index.json'} is missing")):
            open_pipeline_folder(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not valid JSON"),
            ("[]", "is a list, not an object"),
            ("{}", "does not name a pipeline class"),
        ],
    )
    def test_a_model_index_that_says_nothing(self, folder, text, message):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            open_pipeline_folder(folder)
        assert str(folder / "model_index.json") in str(caught.value)

    def test_an_unsupported_pipeline_names_those_that_are(self, folder):
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        with pytest.raises(ValueError, match="StableDiffusionPipeline is not supported") as caught:
            open_pipeline_folder(folder)
        assert "Flux2Pipeline" in str(caught.value)

    @COMPONENT
    def test_a_component_of_another_class(self, folder, component):
        index = json.loads((folder / "model_index.json").read_text())
        expected = index[component][1]
        index[component][1] = "SomethingElse"
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=rf"SomethingElse as its {component}; FLUX\.2 needs a {expected}"):
            open_pipeline_folder(folder)

    @COMPONENT
    def test_a_component_that_the_index_lacks(self, folder, component):
        index = json.loads((folder / "model_index.json").read_text())
        del index[component]
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"has no class as its {component}"):
            open_pipeline_folder(folder)

    @COMPONENT
    def test_a_missing_component_folder(self, folder, component):
        shutil.rmtree(folder / component)
        with pytest.raises(ValueError, match=re.escape(f"{folder / component / 'config.json'} is missing")):
            open_pipeline_folder(folder)

    def test_a_missing_tokenizer(self, folder):
        shutil.rmtree(folder / "tokenizer")
        with pytest.raises(ValueError, match="has no tokenizer folder"):
            open_pipeline_folder(folder)

    def test_a_layout_that_does_not_fit(self, tiny_pipeline):
        with pytest.raises(ValueError, match=r"8 attention heads.*tp x ulysses = 3"):
            open_pipeline_folder(tiny_pipeline).check(ParallelismConfig(tp_size=3))


class TestFiles:
    """Weight files that are missing, cut off or no weight files; found before any worker starts."""

    @staticmethod
    def refused(folder: Path, file: Path, message: str) -> None:
        source = open_pipeline_folder(folder)
        with pytest.raises(ValueError, match=message) as caught:
            source.check(ParallelismConfig())
        assert str(file) in str(caught.value)

    @COMPONENT
    def test_no_weights(self, folder, component):
        (folder / component / WEIGHTS[component]).unlink()
        self.refused(folder, folder / component, r"holds no \.safetensors file")

    @COMPONENT
    @pytest.mark.parametrize("missing", [1, 1000])
    def test_bytes_cut_off(self, folder, component, missing):
        file = folder / component / WEIGHTS[component]
        size = file.stat().st_size
        os.truncate(file, size - missing)
        self.refused(folder, file, rf"has {size - missing} bytes but its header describes {size}: it was cut off")

    def test_bytes_appended(self, folder):
        file = folder / "transformer" / WEIGHTS["transformer"]
        with file.open("ab") as stream:
            stream.write(b"\n")
        self.refused(folder, file, "bytes but its header describes")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x10",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
            b"<html>not found</html>" * 100,
            struct.pack("<Q", 20) + b"\xff" * 40,
            struct.pack("<Q", 12) + b"[1, 2, 3, 4]",
            struct.pack("<Q", 12) + b'{"a": "b"   ' + b"}",
            struct.pack("<Q", 13) + b'{"a": "b"   }',
            struct.pack("<Q", 13) + b'{"a": {}    }',
            struct.pack("<Q", 1 << 40) + b"{}" * 100,
        ],
        ids=["empty", "a byte", "lfs pointer", "html", "binary", "list", "cut", "text entry", "empty entry", "length"],
    )
    def test_garbage(self, folder, content):
        file = folder / "transformer" / WEIGHTS["transformer"]
        file.write_bytes(content)
        self.refused(folder, file, "download it again")

    def test_a_file_that_the_index_names_is_missing(self, sharded):
        gone = sorted(sharded.glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(ValueError, match=re.escape(f"{gone} is missing; download the model again or restore")):
            index_folder(sharded)

    def test_a_file_that_the_index_names_is_cut_off(self, sharded):
        cut = sorted(sharded.glob("*.safetensors"))[-1]
        os.truncate(cut, cut.stat().st_size // 2)
        with pytest.raises(ValueError, match="cut off") as caught:
            index_folder(sharded)
        assert str(cut) in str(caught.value)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}'])
    def test_an_index_that_cannot_be_read(self, sharded, text):
        (index,) = sharded.glob("*.index.json")
        index.write_text(text)
        with pytest.raises(ValueError, match=r"is not (an index of weight files|valid JSON)") as caught:
            index_folder(sharded)
        assert str(index) in str(caught.value)

    def test_a_header_is_read_without_its_tensors(self, tmp_path):
        """A model of many gigabytes is checked in no time: the tensors' bytes here are a hole that is never read."""
        size = 1 << 40
        header = json.dumps({"big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
        file = tmp_path / "big.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(file, 8 + len(header) + size)
        assert read_header(file)["big"].nbytes == size


class TestTensors:
    """Tensors that are missing or of another shape: named with their file, whatever part of them a rank would read."""

    BLOCK = "transformer_blocks.1.attn.to_q.weight"

    @pytest.mark.parametrize(
        "key", [BLOCK, "proj_out.weight", "single_transformer_blocks.0.attn.norm_q.weight"], ids=lambda key: key
    )
    def test_missing(self, folder, key):
        change_tensors(folder / "transformer" / WEIGHTS["transformer"], lambda tensors: tensors.pop(key))
        with pytest.raises(ValueError, match=re.escape(f"have no tensor {key}")) as caught:
            load(folder)
        assert WEIGHTS["transformer"] in str(caught.value)

    @pytest.mark.parametrize("degree", [1, 2])
    @pytest.mark.parametrize(
        ("key", "shape"),
        [
            (BLOCK, [256, 128]),
            (BLOCK, [64, 128]),
            (BLOCK, [128, 64]),
            (BLOCK, [128]),
            ("transformer_blocks.0.ff.linear_out.weight", [128, 512]),
            ("single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight", [1153, 128]),
            ("x_embedder.weight", [128, 129]),
            ("transformer_blocks.0.attn.norm_q.weight", [32]),
        ],
    )
    def test_of_another_shape(self, folder, key, shape, degree):
        file = folder / "transformer" / WEIGHTS["transformer"]
        change_tensors(file, lambda tensors: tensors.update({key: torch.zeros(shape)}))
        expected = list(load_file(file)[key].shape)
        assert expected == shape
        with pytest.raises(ValueError, match=re.escape(f"{key} in {file} has shape {shape}")):
            load_transformer(folder / "transformer", folder, Axis(None, degree, 0))

    def test_of_the_text_encoder(self, folder):
        file = folder / "text_encoder" / WEIGHTS["text_encoder"]
        key = next(name for name in load_file(file) if name.endswith("layers.2.mlp.up_proj.weight"))
        change_tensors(file, lambda tensors: tensors.update({key: torch.zeros(3, 5)}))
        with pytest.raises(ValueError, match=re.escape(f"{key} in {file} has shape [3, 5]")):
            load(folder)

    def test_no_embedding_in_the_text_encoder(self, folder):
        file = folder / "text_encoder" / WEIGHTS["text_encoder"]
        key = next(name for name in load_file(file) if name.endswith("embed_tokens.weight"))
        change_tensors(file, lambda tensors: tensors.pop(key))
        with pytest.raises(ValueError, match=r"0 tensors named \*embed_tokens\.weight"):
            load(folder)

    @pytest.mark.parametrize(
        ("component", "key"),
        [
            ("transformer", "proj_out.weight"),
            ("text_encoder", "layers.0.mlp.up_proj.weight"),
            ("vae", "decoder.conv_in.weight"),
            ("vae", "bn.running_var"),
        ],
    )
    def test_missing_or_misshapen_in_any_component(self, folder, component, key):
        """All are looked at before a process starts; diffusers alone would go on with random weights in the VAE."""
        open_pipeline_folder(folder).check_weights()
        file = folder / component / WEIGHTS[component]
        stored = next(name for name in load_file(file) if name.endswith(key) and "vision" not in name)
        change_tensors(file, lambda tensors: tensors.update({stored: torch.zeros(3, 5)}))
        with pytest.raises(ValueError, match=re.escape(f"{stored} in {file} has shape [3, 5]")):
            open_pipeline_folder(folder).check_weights()
        change_tensors(file, lambda tensors: tensors.pop(stored))
        with pytest.raises(ValueError, match=re.escape(f"have no tensor {key}") + f".*{file.name}"):
            open_pipeline_folder(folder).check_weights()

    def test_more_layers_asked_for_than_there_are(self, folder):
        config = json.loads((folder / "text_encoder" / "config.json").read_text())
        config["text_encoder_out_layers"] = [1, 2, 6]
        (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="the text encoder has 5 layers, but layer 6 is asked for"):
            load(folder)


class TestFingerprint:
    """Groups are keyed by it: a changed checkpoint must not meet the workers that hold the old one."""

    def test_it_stays_while_nothing_changes(self, folder):
        before = open_pipeline_folder(folder).fingerprint()
        (folder / "notes.txt").write_text("not part of the model")
        assert open_pipeline_folder(folder).fingerprint() == before

    @pytest.mark.parametrize(
        "file", [*(f"{component}/{file}" for component, file in WEIGHTS.items()), "vae/config.json"]
    )
    def test_a_file_written_anew_changes_it(self, folder, file):
        before = open_pipeline_folder(folder).fingerprint()
        status = (folder / file).stat()
        (folder / file).write_bytes((folder / file).read_bytes())
        # File systems' clocks are coarse: make sure that it is another time.
        os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
        assert open_pipeline_folder(folder).fingerprint() != before

    def test_another_size_changes_it_even_at_the_same_time(self, folder):
        before = open_pipeline_folder(folder).fingerprint()
        file = folder / "transformer" / WEIGHTS["transformer"]
        status = file.stat()
        change_tensors(file, lambda tensors: tensors.update(more=torch.zeros(4)))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert open_pipeline_folder(folder).fingerprint() != before

    def test_a_removed_file_changes_it(self, folder):
        before = open_pipeline_folder(folder).fingerprint()
        (folder / "vae" / WEIGHTS["vae"]).unlink()
        assert open_pipeline_folder(folder).fingerprint() != before
