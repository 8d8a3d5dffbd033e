"""Host memory while a rank loads its shards: a few buffers above what it keeps, whatever the size of the checkpoint."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from parallel_backend.loading.safetensors_reader import read_header
from parallel_backend.loading.staging import BUFFER_BYTES, BUFFERS
from tests.single_file import flux2_shapes, write

pytestmark = pytest.mark.timeout(180)

TP = 4
UNSPLIT = 1.3
"""A rank's share of so small a model may be so many times what it would be if all of it were split."""
MORE_BYTES = 0.3e9
"""What the large one has more than the small one, at least."""
SIZES = {"small": {"heads": 12, "double": 1, "single": 2}, "large": {"heads": 12, "double": 1, "single": 8}}


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measure(path: str, dtype: torch.dtype) -> None:
    """Load rank 0's shards at TP-4 as a dtype; print the bytes held, and the peak of anonymous memory above those."""
    from parallel_backend.loading.single_file import open_single_file
    from parallel_backend.loading.weight_loader import load_weights
    from parallel_backend.mesh import Axis
    from parallel_backend.parallel.tensor import apply_tensor_parallel

    source = open_single_file(path)
    model = source.family.transformer.build(source.transformer_config)
    table = apply_tensor_parallel(model, source.family.transformer.plan(source.transformer_config), Axis(None, TP, 0))
    base, done, peak, held = anonymous_bytes(), threading.Event(), 0, 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes() - base - held)

    def count(new: int) -> None:
        nonlocal held
        held += new

    watcher = threading.Thread(target=watch)
    watcher.start()
    load_weights(model, source.weights("transformer"), table, device=torch.device("cpu"), dtype=dtype,
                 on_bytes=count)  # fmt: skip
    done.set()
    watcher.join()
    print(json.dumps([held, peak]))


def random_file(path, size):
    """A checkpoint in bf16; the same numbers in each tensor, since billions of new ones take long to draw."""
    numbers = torch.randn(2**20, dtype=torch.bfloat16)
    tensors = {
        name: numbers.repeat(math.prod(shape) // len(numbers) + 1)[: math.prod(shape)].view(shape)
        for name, shape in flux2_shapes(**size).items()
    }
    return write(path, tensors)


def measure_all(folder: str, dtype: torch.dtype) -> None:
    """Measure each file there with a dtype, in forks of this process: imports take longer than the rest."""
    from parallel_backend.loading.single_file import open_single_file  # noqa: F401

    for name in SIZES:
        if not (pid := os.fork()):
            measure(f"{folder}/{name}.safetensors", dtype)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.thorough)], ids=["as stored", "cast"]
)
def test_it_does_not_grow_with_the_model(tmp_path, dtype):
    found = []
    for name, size in SIZES.items():
        file = random_file(tmp_path / f"{name}.safetensors", size)
        found.append([sum(tensor.nbytes for tensor in read_header(file).values())])
    code = (
        f"import torch; from tests.unit.test_loading_memory import measure_all; measure_all({str(tmp_path)!r}, {dtype})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(tmp_path)
    for one, line in zip(found, done.stdout.splitlines(), strict=True):
        one += json.loads(line)
    (small, small_held, small_peak), (large, large_held, large_peak) = found
    assert large - small > MORE_BYTES
    for stored, held in ((small, small_held), (large, large_held)):
        assert stored / TP <= held / (dtype.itemsize / 2) <= UNSPLIT * stored / TP
    # The ring; or, where bytes go straight to their places, what is there of tensors that do not count as held yet. And
    # the tensor that is being filled, at most 38 MB in fp32; threads and their allocators take some.
    assert large_peak <= BUFFERS * BUFFER_BYTES + 100e6
    assert large_peak <= small_peak + MORE_BYTES / 10
