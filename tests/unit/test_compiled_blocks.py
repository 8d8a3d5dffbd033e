"""Compiled blocks as the compiler sees them on a GPU, traced on the CPU: what a kernel is chosen by is known to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel_backend.bench.quantized import quantize
from parallel_backend.config import ParallelismConfig, Speed
from parallel_backend.mesh import single_mesh
from parallel_backend.parallel import attention, elementwise, fp8
from parallel_backend.parallel.elementwise import HeadInputs, Table
from parallel_backend.parallelize import parallelize_transformer
from tests.distributed import cases, qwen_cases, wan_cases, z_image_cases
from tests.errors import relative_error

Family = Callable[[], tuple[Any, Any, dict[str, Any]]]
"""A transformer's adapter, a model, and two forwards' arguments, of other numbers of tokens."""


def flux2() -> tuple[Any, Any, list[dict[str, Any]]]:
    inputs = [cases.flux2_inputs(text, [(size, size)], 1) for text, size in ((8, 8), (6, 10))]
    return cases.FLUX2.transformer, cases.tiny_transformer(), inputs


def qwen_image() -> tuple[Any, Any, list[dict[str, Any]]]:
    inputs = [qwen_cases.transformer_inputs(text, [(size, size)], 1) for text, size in ((8, 8), (6, 10))]
    return qwen_cases.QWEN.transformer, qwen_cases.tiny_transformer(), inputs


def wan() -> tuple[Any, Any, list[dict[str, Any]]]:
    model = wan_cases.tiny_transformer()
    inputs = [wan_cases.inputs_of(model, wan_cases.Case(size)) for size in ((3, 4, 4), (2, 6, 4))]
    return wan_cases.WAN, model, inputs


def z_image() -> tuple[Any, Any, list[dict[str, Any]]]:
    inputs = [z_image_cases.inputs_of([(text, (size, size))]) for text, size in ((8, 8), (6, 10))]
    return z_image_cases.Z_IMAGE, z_image_cases.tiny_transformer(), inputs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Head sizes for which a kernel of attention was asked for; operators that a GPU has kernels for are opaque."""
    sizes: list[int] = []
    on_cpu = elementwise.has_kernels

    def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with monkeypatch.context() as patched:
                patched.setattr(elementwise, "has_kernels", on_cpu)
                return function(*args)

        return run

    def pack(tensors: list[Tensor], cos: Tensor, sin: Tensor, eps: float, parts: int, apart: bool, factors: Any) -> Any:
        streams = [HeadInputs(*tensors[first : first + 5], eps) for first in range(0, len(tensors), 5)]
        return elementwise.pack(streams, cos, sin, parts, apart=apart, factors=factors)

    def turn(fused: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> None:
        fused.copy_(elementwise.turn(fused.clone(), query_weight, key_weight, eps, cos, sin).flatten(2))

    def norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, picks: Tensor | None) -> Tensor:
        return elementwise.modulated_norm(x, Table(shift, scale, scale, picks), eps)

    @torch._dynamo.assume_constant_result
    def choose(size: int) -> str:
        sizes.append(size)
        return "plain"

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert choose(query.shape[-1]) == "plain"
        return compute(query, key, value)

    compute = attention.attention
    monkeypatch.setattr(attention, "attention", attend)
    monkeypatch.setattr(elementwise, "has_kernels", lambda _: torch.compiler.is_compiling())
    library = torch.library.Library("hybrid_dit", "IMPL")
    operators = {"pack": pack, "turn": turn, "modulated_norm": norm, "widened": fp8.widened}
    for name, function in operators.items():
        library.impl(name, plainly(function), "CPU")
    torch._dynamo.reset()
    yield sizes
    library._destroy()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "weights"),
    [(flux2, ""), (flux2, "int8"), (flux2, "fp8 as storage"), (qwen_image, ""), (wan, ""), (z_image, "")],
)
def test_the_head_size_is_known_and_tokens_are_not(
    family: Family, weights: str, asked: list[int], monkeypatch: Any
) -> None:
    graphs = 0

    def counted(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda core, options, **how: compiler(core, backend=counted, **how))
    transformer, model, inputs = family()
    with torch.inference_mode():
        if weights:
            quantize(model, weights, {}, torch.float32)
        expected = [model(**one, return_dict=False)[0] for one in inputs]
        parallelize_transformer(model, transformer, ParallelismConfig(), single_mesh("cpu"), Speed(compile=True))
        counts = []
        for one, wanted in zip(inputs, expected, strict=True):
            for actual, whole in zip(model(**one, return_dict=False)[0], wanted, strict=True):
                # Inputs are rounded to 8 bits: what was 1e-7 apart is a whole step apart where it lies in between.
                assert relative_error(actual, whole) < (0.05 if weights == "int8" else 1e-5)
            counts.append(graphs)
    assert asked
    assert all(type(size) is int for size in asked)
    assert counts[0] == counts[1] > 0
