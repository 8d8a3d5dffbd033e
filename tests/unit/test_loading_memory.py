"""Host memory while a rank loads its shards: a few buffers above what it keeps, whatever the size of the checkpoint."""

import json
import math
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
SMALL, LARGE = {"heads": 12, "double": 1, "single": 4}, {"heads": 12, "double": 2, "single": 29}


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["as stored", "cast"])
def test_it_does_not_grow_with_the_model(tmp_path, dtype):
    peaks = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        path = random_file(tmp_path / f"{name}.safetensors", size)
        stored = sum(tensor.nbytes for tensor in read_header(path).values())
        assert (stored > 1.95e9) == (name == "large")
        code = f"from tests.unit.test_loading_memory import measure, torch; measure({str(path)!r}, {dtype})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        held, peaks[name] = json.loads(done.stdout.splitlines()[-1])
        assert stored / TP <= held / (dtype.itemsize / 2) <= 1.1 * stored / TP
        path.unlink()
    # The ring; or, where bytes go straight to their places, what is there of tensors that do not count as held yet. And
    # the tensor that is being filled, at most 38 MB in fp32; threads and their allocators take some.
    assert peaks["large"] <= BUFFERS * BUFFER_BYTES + 100e6
    # 1.5 GB more of a model.
    assert peaks["large"] <= peaks["small"] + 50e6
