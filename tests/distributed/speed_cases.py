"""What the ranks of the test world say about speed: the order of what they launch, and how often they compile."""

from __future__ import annotations

import re
import time
import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from parallel_backend.blocks import double_stream as blocks
from parallel_backend.config import ParallelismConfig, Speed
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallel import attention, exchange, long_mlp
from parallel_backend.parallel.graphs import _alike
from parallel_backend.parallelize import parallelize_transformer
from tests.distributed.cases import FLUX2, flux2_inputs, in_pieces, relative_error, tiny_transformer

NAMES = {
    "mm": "GEMM",
    "bmm": "GEMM",
    "addmm": "GEMM",
    "addmm_": "GEMM",
    "add_product": "GEMM",
    "mlp_in_pieces": "GEMM",
    "mlp_in_place": "GEMM",
    "all_to_all_single": "exchange",
} | {name: "sum" for name in ("all_reduce", "all_reduce_")}
ATTENTION = "scaled_dot_product"


def kind(name: str) -> str | None:
    """What an operation is called in the tests: GEMM, attention, exchange, sum or wait; None for all else."""
    if name.startswith(("cpp_fused", "triton_")):  # the compiler's own kernels, named after what they stand beside
        return None
    if ATTENTION in name:
        return "attention"
    return "wait" if name == "wait_tensor" else NAMES.get(name)


class Recorder(TorchDispatchMode):
    """Notes what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = kind(function.overloadpacket.__name__)
        if found:
            self.events.append(found)
        return function(*args, **(kwargs or {}))


@in_pieces
def eager_order(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, list[str]]:
    """What one block of each kind launches, in order, by its class."""
    model, found = tiny_transformer(num_layers=1, num_single_layers=1), {}
    blocks.TILE = 2
    parallelize_transformer(model, FLUX2.transformer, layout, mesh)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        original = block.forward

        def recorded(*args: Any, original: Any = original, name: str = type(block).__name__, **kwargs: Any) -> Any:
            with Recorder() as recorder:
                out = original(*args, **kwargs)
            found[name] = recorder.events
            return out

        block.forward = recorded
    model(**flux2_inputs(8, [(8, 8)], 1), return_dict=False)
    return found


@in_pieces
def lingering(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, list[int]]:
    """How much is still there of what a forward is done with.

    Of what was sent to attention, whenever attention begins; of earlier pieces of MLPs, whenever another begins.
    """
    model = tiny_transformer()
    blocks.TILE = 2
    parallelize_transformer(model, FLUX2.transformer, layout, mesh)
    sent: list[Any] = []
    pieces: list[Any] = []
    found: dict[str, list[int]] = {"sent": [], "pieces": []}
    spread, compute, activate = exchange.spread_heads, attention.attention, long_mlp.swiglu_in_place

    def alive(references: list[Any]) -> int:
        return sum(reference() is not None for reference in references)

    def spread_noted(x: torch.Tensor, *args: Any) -> Any:
        sent.append(weakref.ref(x))
        return spread(x, *args)

    def compute_noted(*args: Any) -> Any:
        end = time.monotonic() + 2  # gloo's thread may be about to let go of it
        while alive(sent) and time.monotonic() < end:
            time.sleep(0.01)
        found["sent"].append(alive(sent))
        return compute(*args)

    def activate_noted(x: torch.Tensor) -> torch.Tensor:
        found["pieces"].append(alive(pieces))
        hidden = activate(x)
        pieces.append(weakref.ref(hidden))
        return hidden

    with (
        patch.object(exchange, "spread_heads", spread_noted),
        patch.object(attention, "attention", compute_noted),
        patch.object(long_mlp, "swiglu_in_place", activate_noted),
    ):
        model(**flux2_inputs(8, [(8, 8)], 1), return_dict=False)
    return found


def of_copies(_: Any, args: Any, kwargs: Any) -> Any:
    """What a block is given, copied to where a CUDA graph would read it."""
    return tree_map_only(torch.Tensor, lambda x: _alike(x).copy_(x), (args, kwargs))


@in_pieces
def compiled(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, Any]:
    """Errors of a compiled model against the untouched one, what was compiled, and its order.

    For several sizes, and for the last of them with blocks that get copies, for which nothing may be compiled anew.
    """
    whole, model = tiny_transformer(), tiny_transformer()
    blocks.TILE = 2
    torch._dynamo.reset()
    counters.clear()
    parallelize_transformer(model, FLUX2.transformer, layout, mesh, Speed(compile=True))

    def evaluated(inputs: dict[str, Any]) -> torch.Tensor:
        with torch.inference_mode():  # as the workers do
            return model(**inputs).sample

    _, codes = run_and_get_code(lambda: evaluated(flux2_inputs(16, [(8, 8)], 1)))
    errors, graphs = [], [counters["stats"]["unique_graphs"]]
    for text, size in ((16, (8, 8)), (17, (8, 8)), (40, (8, 8)), (9, (7, 9))):
        inputs = flux2_inputs(text, [size], 1)
        errors.append(relative_error(evaluated(inputs), whole(**inputs).sample))
        graphs.append(counters["stats"]["unique_graphs"])
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(of_copies, with_kwargs=True)
    errors.append(relative_error(evaluated(inputs), whole(**inputs).sample))
    graphs.append(counters["stats"]["unique_graphs"])
    launched = [
        [
            found
            for name in re.findall(r"(\w+)(?:\.default)?\(", code[code.index("def call(") :])
            if (found := kind(name))
        ]
        for code in codes
    ]
    return {"errors": errors, "graphs": graphs, "breaks": dict(counters["graph_break"]), "order": launched}
