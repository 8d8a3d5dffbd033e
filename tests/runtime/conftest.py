"""Small pipeline folders for the tests with real worker processes, and a home of their own."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_pipeline import make_tiny_pipeline
from tests.tiny_qwen import make_tiny_qwen


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory) -> Path:
    """Nothing is written to the user's home."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_DIT_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline folder, shared by all tests: not to be changed."""
    folder = make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")
    # The demo's latent statistics are mean 0 and variance 1, which nobody would miss.
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    tensors["bn.running_mean"] = torch.randn(128, generator=generator) * 0.3
    tensors["bn.running_var"] = torch.rand(128, generator=generator) + 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory) -> Callable[[str], Path]:
    """From a pipeline class of Qwen-Image to a folder of it, shared by all tests: not to be changed."""
    return functools.cache(lambda kind: make_tiny_qwen(tmp_path_factory.mktemp("models") / kind, kind))
