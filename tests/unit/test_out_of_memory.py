"""Out of memory: torch's own errors are read, and the advice has numbers that are true."""

import pytest
import torch

from parallel_backend import ParallelismConfig
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.runtime.group_config import ModelConfig
from parallel_backend.runtime.rank.out_of_memory import advice, out_of_memory
from tests.tiny_pipeline import make_tiny_pipeline

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 512.00 MiB is "
    "free. Process 1 has 78.6 GiB memory in use."
)


def test_cudas_words():
    found = out_of_memory(torch.OutOfMemoryError(CUDA), lambda: 7)
    assert found == (5 * 2**29, 2**29)


def test_the_cpus_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value, lambda: 7) == (2**60, 7)


def test_pythons_own():
    assert out_of_memory(MemoryError(), lambda: 7) == (0, 7)


def test_another_error():
    assert out_of_memory(RuntimeError("size mismatch"), lambda: 7) is None


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_checkpoint(make_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_step_is_told_of_layouts_that_hold_less(source):
    config = ModelConfig.create(source.path, ParallelismConfig(ulysses_size=2), "cpu")
    text = advice(config, source, "transformer")
    assert "a smaller picture" in text
    assert "TP-2 on 2 devices" in text
    assert "Ulysses-2-TP-2 on 4 devices" in text
    assert "encoder_memory to 'host'" in text


def test_layouts_that_the_heads_do_not_allow_are_not_proposed(source):
    # The tiny model has 8 heads.
    config = ModelConfig.create(source.path, ParallelismConfig(tp_size=8), "cpu", encoder_memory="host")
    text = advice(config, source, "transformer")
    assert "TP" not in text
    assert "encoder_memory" not in text


def test_the_vae_is_told_of_tiles(source):
    config = ModelConfig.create(source.path, ParallelismConfig(), "cpu")
    assert "VAE Decode (Tiled)" in advice(config, source, "vae")
