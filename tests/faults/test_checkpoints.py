"""Checkpoints with something wrong in their headers or configurations: a ValueError names them, or they are read."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from parallel_backend import ParallelismConfig
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.loading.safetensors_reader import DTYPES, index_folder, read_header
from parallel_backend.loading.single_file import open_single_file
from parallel_backend.loading.text_encoder_file import open_text_encoder_file
from tests.single_file import flux2_tensors, to_fp8, write
from tests.text_encoder_file import write_text
from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_qwen import make_tiny_qwen, single_file_tensors, tiny_transformer

from .spoiled import TRIED, VALUES, File, changed, headers, other_files

MEMORY_KIB = 200 * 1024
"""More than looking at any of these files is worth."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, File]:
    """Transformers and text encoders of both families in proper files, some of them in 8 bits."""
    small = flux2_tensors(heads=1, double=1, single=1)
    written = {
        "FLUX.2": write(folder / "flux2.safetensors", small),
        "FLUX.2, comfy_quant": write(folder / "quant.safetensors", to_fp8(small, "comfy_quant")[0]),
        "Mistral": write_text(folder / "mistral.safetensors", "bf16"),
        "Qwen-Image": folder / "qwen.safetensors",
    }
    stored, metadata = to_fp8(small, "metadata", matmul=True)
    written["FLUX.2, table"] = write(folder / "table.safetensors", stored, "model.diffusion_model.", metadata)
    save_file(dict(single_file_tensors(tiny_transformer(num_layers=1))), written["Qwen-Image"])
    return {name: File.read(path) for name, path in written.items()}


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Fails where what is done inside takes much memory, if only for a moment."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_kib()
    yield
    assert _peak_kib() - before < MEMORY_KIB


def _peak_kib() -> int:
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak)


def look_at(path: Path, opener=open_checkpoint) -> None:
    """All that is done with a checkpoint before a process is started."""
    text = path.name
    with little_memory():
        try:
            source = opener(path)
            source.check(ParallelismConfig())
            source.check_weights()
            source.fingerprint()
        except ValueError as error:
            text = str(error)
    assert path.name in text, text
    assert len(text) < 2000, text


KINDS = ["FLUX.2", "FLUX.2, comfy_quant", "FLUX.2, table", "Mistral", "Qwen-Image"]
OPENERS = [open_checkpoint, open_single_file, open_text_encoder_file]


@given(
    st.data(),
    st.sampled_from(KINDS),
    st.sampled_from(OPENERS),
    st.sampled_from(["header", "header", "other", "other", "length", "cut"]),
)
def test_files(folder: Path, files: dict[str, File], data: st.DataObject, which: str, opener, what: str):
    TRIED["safetensors files"] += 1
    file, path = files[which], folder / "spoiled.safetensors"
    if what == "header":
        file.write(path, header=data.draw(headers(file)))
    elif what == "other":
        file = data.draw(other_files(file))
        file.write(path)
    elif what == "length":
        file.write(path, length=data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 10_000)))
    else:
        file.write(path, size=data.draw(st.integers(0, 10_000) | st.integers(0, 200_000)))
    look_at(path, opener)
    _compare_with_safetensors(path)


def _compare_with_safetensors(path: Path) -> None:
    """What is read here, safetensors' own reader reads too, and sees the same in it."""
    try:
        tensors = read_header(path)
    except ValueError:
        return
    # It maps all of a file into memory, and does not know all dtypes.
    if path.stat().st_size < 2**30 and all(tensor.dtype in DTYPES for tensor in tensors.values()):
        with safe_open(str(path), framework="pt") as theirs:
            assert set(theirs.keys()) == set(tensors)
            for key, tensor in tensors.items():
                assert theirs.get_slice(key).get_shape() == list(tensor.shape)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> dict[str, tuple[Path, dict[Path, bytes]]]:
    """Pipeline folders to spoil, and their files of JSON as they were."""
    root = tmp_path_factory.mktemp("pipelines")
    folders = [make_tiny_pipeline(root / "spoiled-flux2"), make_tiny_qwen(root / "spoiled-qwen")]
    names = ("model_index.json", "transformer/config.json", "text_encoder/config.json", "vae/config.json")
    return {
        folder.name: (folder, {folder / name: (folder / name).read_bytes() for name in names}) for folder in folders
    }


@settings(max_examples=settings.default.max_examples // 2)
@given(st.data(), st.sampled_from(["spoiled-flux2", "spoiled-qwen"]))
def test_folders(spoiled, data: st.DataObject, which: str):
    TRIED["pipeline folders"] += 1
    folder, originals = spoiled[which]
    file = data.draw(st.sampled_from(sorted(originals)))
    content = data.draw(changed(json.loads(originals[file])).map(json.dumps) | st.just('{"a": ' * 100_000))
    file.write_text(content)
    try:
        look_at(folder)
    finally:
        file.write_bytes(originals[file])


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("transformer", "num_layers", 10**8),
        ("transformer", "num_attention_heads", 2**40),
        ("text_encoder", "num_hidden_layers", 10**8),
        ("text_encoder", "head_dim", 2**33),
        ("text_encoder", "hidden_size", 2**33),
        ("vae", "block_out_channels", [8] * 10**6),
        ("vae", "layers_per_block", 10**7),
    ],
)
def test_numbers_that_no_model_has(file: str, name: str, value, spoiled):
    folder, originals = spoiled["spoiled-flux2"]
    path = folder / file / "config.json"
    config = json.loads(originals[path])
    (config["text_config"] if file == "text_encoder" else config)[name] = value
    path.write_text(json.dumps(config))
    try:
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is no model's configuration: {name}"):
            open_checkpoint(folder)
    finally:
        path.write_bytes(originals[path])


@pytest.mark.parametrize("where", ["text_config", None])
def test_a_configuration_cannot_ask_for_code(where: str | None, spoiled):
    """Attention "kernels" are native code that transformers would fetch, classes in an auto_map are Python."""
    for folder, originals in spoiled.values():
        path = folder / "text_encoder" / "config.json"
        config = json.loads(originals[path])
        (config[where] if where else config).update(
            attn_implementation="kernels-community/flash-attn", auto_map={"AutoModel": "someone/model--code.Model"}
        )
        path.write_text(json.dumps(config))
        try:
            models = open_checkpoint(folder)._build()
        finally:
            path.write_bytes(originals[path])
        for name in ("text_encoder", "vision_tower") if "qwen" in folder.name else ("text_encoder",):
            assert models[name].config._attn_implementation == "sdpa"
            assert type(models[name]).__module__.startswith("transformers.models.")


@pytest.mark.parametrize("name", ["model_index.json", "transformer", "transformer/config.json", "text_encoder", "vae"])
def test_what_is_missing_is_named(name: str, spoiled, tmp_path):
    copy = shutil.copytree(spoiled["spoiled-flux2"][0], tmp_path / "copy")
    file = copy / name
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(ValueError, match=Path(name).name):
        open_checkpoint(copy).check_weights()


NAMES = st.sampled_from(
    ["../secret.safetensors", "secret.safetensors/", "..", ".", "", "a\0b", "x" * 300, "/etc/passwd"]
)


@given(st.data())
def test_an_index_names_files_beside_it(folder: Path, data: st.DataObject):
    TRIED["indexes of weight files"] += 1
    component = folder / "component"
    component.mkdir(exist_ok=True)
    secret = folder / "secret.safetensors"
    if not secret.exists():
        write(secret, {"x": flux2_tensors(heads=1, double=1, single=1)["img_in.weight"]})
    names = st.dictionaries(st.text(max_size=3), NAMES | st.just(str(secret)) | VALUES, max_size=2)
    index = data.draw(VALUES | st.fixed_dictionaries({"weight_map": names | VALUES}))
    (component / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="component") as caught:
        index_folder(component)
    assert len(str(caught.value)) < 2000


def test_a_link_to_nowhere(spoiled, tmp_path):
    copy = shutil.copytree(spoiled["spoiled-flux2"][0], tmp_path / "copy")
    before = open_checkpoint(copy).fingerprint()
    (copy / "gone.json").symlink_to(tmp_path / "nowhere")
    assert open_checkpoint(copy).fingerprint() == before
