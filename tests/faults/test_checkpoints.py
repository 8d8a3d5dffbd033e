"""Checkpoints with one thing wrong in their headers or configurations: a ValueError names them, or they are read."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel_backend import ParallelismConfig
from parallel_backend.loading.checkpoint import open_checkpoint
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import write_text
from tests.tiny_pipeline import make_tiny_pipeline

from .test_messages import changed

MEMORY_KIB = 200 * 1024
"""More than any of these files is worth."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, bytes]:
    """A transformer's and a text encoder's file."""
    return {
        "transformer": write(folder / "transformer.safetensors", flux2_tensors()).read_bytes(),
        "text encoder": write_text(folder / "text.safetensors").read_bytes(),
    }


def look_at(path: Path) -> None:
    """All that is done with a checkpoint before a process is started."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = path.name
    try:
        source = open_checkpoint(path)
        source.check(ParallelismConfig())
        source.check_weights()
        source.fingerprint()
    except ValueError as error:
        text = str(error)
    assert path.name in text, text
    assert len(text) < 2000, text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KIB


@given(
    st.data(), st.sampled_from(["transformer", "text encoder"]), st.sampled_from(["header", "length", "cut", "noise"])
)
def test_files(folder: Path, files: dict[str, bytes], data: st.DataObject, which: str, what: str):
    original = files[which]
    (length,) = struct.unpack("<Q", original[:8])
    header, weights = original[8 : 8 + length], original[8 + length :]
    if what == "header":
        text = json.dumps(data.draw(changed(json.loads(header)))).encode()
        content = struct.pack("<Q", len(text)) + text + weights
    elif what == "length":
        content = (
            struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * length))) + header + weights
        )
    elif what == "cut":
        content = original[: data.draw(st.integers(0, 9 + length) | st.integers(0, len(original)))]
    else:
        start = data.draw(st.integers(0, length + 8))
        noise = data.draw(st.binary(min_size=1, max_size=16))
        content = original[:start] + noise + original[start + len(noise) :]
    path = folder / "spoiled.safetensors"
    path.write_bytes(content)
    look_at(path)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory) -> tuple[Path, dict[Path, bytes]]:
    """A pipeline folder to spoil, and its files of JSON as they were."""
    folder = make_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "spoiled")
    names = ("model_index.json", "transformer/config.json", "text_encoder/config.json", "vae/config.json")
    return folder, {folder / name: (folder / name).read_bytes() for name in names}


@given(st.data())
def test_folders(spoiled, data: st.DataObject):
    folder, originals = spoiled
    file = data.draw(st.sampled_from(sorted(originals)))
    file.write_text(json.dumps(data.draw(changed(json.loads(originals[file])))))
    try:
        look_at(folder)
    finally:
        file.write_bytes(originals[file])


@pytest.mark.parametrize("name", ["model_index.json", "transformer", "transformer/config.json", "text_encoder", "vae"])
def test_what_is_missing_is_named(name: str, spoiled, tmp_path):
    copy = shutil.copytree(spoiled[0], tmp_path / "copy")
    file = copy / name
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(ValueError, match=Path(name).name):
        open_checkpoint(copy).check_weights()
