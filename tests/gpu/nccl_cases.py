"""Run by torchrun on two GPUs: errors of bf16 against fp32, on one GPU and on every layout of two, for each family.

Rank 0 writes them as JSON to the file that is named: family -> layout ("one" for one GPU) -> relative error of the
transformer; what the block cache decided on each rank; and how many exchanges by copy engines brought something else
than NCCL.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel

from parallel_backend.cache.block_cache import BlockCache
from parallel_backend.cache.config import CacheSettings, DBCacheConfig
from parallel_backend.cache.decision import Evaluation
from parallel_backend.config import AS_IT_IS, ParallelismConfig, Speed
from parallel_backend.families import Conditioning, family_of_name
from parallel_backend.mesh import SINGLE, Axis, ParallelMesh, build_mesh
from parallel_backend.parallel import copies, exchange
from parallel_backend.parallelize import parallelize_text_encoder, parallelize_transformer
from tests.distributed import qwen_cases
from tests.errors import relative_error

LAYOUTS = {
    "Ulysses-2": ParallelismConfig(ulysses_size=2),
    "Ring-2": ParallelismConfig(ring_size=2),
    "TP-2": ParallelismConfig(tp_size=2),
}
SPEEDS = {
    speed.describe(): speed for speed in (Speed(copy_engines=True), Speed(True, False, True), Speed(True, True, True))
}
ONE = ParallelMesh(*[SINGLE] * 5, "cuda")
STEPS = 10
FORWARDS = 5


def flux2() -> Any:
    """FLUX.2 with 8 heads of 128."""
    return Flux2Transformer2DModel(
        num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=8, joint_attention_dim=512
    )


def qwen_image() -> Any:
    """Qwen-Image with 8 heads of 128."""
    return QwenImageTransformer2DModel(num_layers=4, num_attention_heads=8, joint_attention_dim=512)


MODELS: dict[str, Callable[[], Any]] = {"flux2": flux2, "qwen_image": qwen_image}


def new_model(name: str, dtype: torch.dtype) -> Any:
    """The same weights each time."""
    torch.manual_seed(0)
    return MODELS[name]().to("cuda", dtype).eval()


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Two pictures of odd sizes with a reference, and (for Qwen-Image) prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"flux2": ((128, 33, 31), (128, 9, 20)), "qwen_image": ((16, 1, 65, 62), (16, 1, 18, 41))}[name]
    x, reference = (torch.randn(2, *shape, generator=generator).to("cuda", dtype) for shape in shapes)
    context = torch.randn(2, 77, 512, generator=generator).to("cuda", dtype)
    tensors = {"guidance": torch.tensor([3.0, 4.0])}
    if name == "qwen_image":
        mask = torch.ones(2, 77, dtype=torch.int64)
        mask[0, 60:], mask[1, 71:] = 0, 0
        tensors = {"mask": mask}
    conditioning = Conditioning(context, [reference], tensors)
    return family_of_name(name).transformer.inputs(x, torch.tensor([0.7, 0.4], device="cuda"), conditioning)


def predict(
    name: str, dtype: torch.dtype, layout: ParallelismConfig, mesh: ParallelMesh, speed: Speed = AS_IT_IS
) -> list[torch.Tensor]:
    """The transformer's output in a layout, of five forwards on the same inputs; by the fifth a CUDA graph is replayed.

    What others sent for one forward must not turn up in another, so each of them counts.
    """
    model, inputs = new_model(name, dtype), inputs_of(name, dtype)
    parallelize_transformer(model, family_of_name(name).transformer, layout, mesh, speed)
    with torch.inference_mode():  # as the workers do
        return [model(**inputs, return_dict=False)[0].float() for _ in range(FORWARDS)]


def worst_error(outputs: list[torch.Tensor], exact: torch.Tensor) -> float:
    """The largest relative error of them."""
    return max(relative_error(output, exact) for output in outputs)


def decisions(name: str, layout: ParallelismConfig, mesh: ParallelMesh) -> list[bool]:
    """What the block cache decides in a run whose inputs hardly change, then change."""
    model, family = new_model(name, torch.bfloat16), family_of_name(name)
    parallelize_transformer(model, family.transformer, layout, mesh)
    cache = BlockCache(model, family.transformer.block_stacks, mesh.world)
    settings = CacheSettings(DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.05))
    made = []
    for step in range(STEPS):
        inputs = inputs_of(name, torch.bfloat16)
        if step >= STEPS // 2:
            inputs["hidden_states"] = -inputs["hidden_states"]
        cache.plan(settings, Evaluation("run", "", float(step), STEPS))
        with torch.inference_mode():
            model(**inputs, return_dict=False)
        assert cache.last is not None
        made.append(cache.last.computed)
    return made


def compare_exchanges(rounds: int = 60) -> dict[str, int]:
    """Exchanges of random tensors by NCCL and by copy engines: how many, and how many brought something else."""
    rank, degree = dist.get_rank(), dist.get_world_size()

    def axis(by_copies: bool) -> Axis:
        return Axis(dist.new_group(list(range(degree))), degree, rank, by_copies)

    plain, heads, ring, sums = axis(False), axis(True), axis(True), axis(True)
    compared = different = 0

    def compare(start: Callable[..., exchange.InFlight], x: torch.Tensor, quick: Axis, *arguments: Any) -> None:
        nonlocal compared, different
        expected = exchange.arrived(start(x.clone(), *arguments, plain))
        compared += 1
        different += not torch.equal(exchange.arrived(start(x.clone(), *arguments, quick)), expected)

    def shift(x: torch.Tensor, tokens: list[int], over: Axis) -> exchange.InFlight:
        return exchange.shift(x, tokens[1 - rank], over, tokens)

    for number in range(rounds):
        if number % 10 == 0:
            for each in (heads, ring, sums):
                exchange.begin(each)
        torch.manual_seed(2 * number + rank)
        tokens = ([2304, 2304], [100, 101], [1, 0])[number % 3]
        local, options = tokens[rank], {"device": "cuda", "dtype": torch.bfloat16}
        compare(exchange.spread_heads, torch.randn(2 * local, 1, 3, 4, 128, **options), heads, tokens)
        compare(exchange.gather_heads, torch.randn(sum(tokens), 1, 4, 128, **options), heads, tokens)
        compare(shift, torch.randn(local, 1, 2, 8, 128, **options), ring, tokens)
        compare(exchange.all_reduce, torch.randn(1, 100 + number, 1024, **options), sums)
    return {"compared": compared, "different": different}


def text_error(mesh: ParallelMesh) -> dict[str, float]:
    """Errors of Qwen2.5-VL's context in bf16 on one GPU and on two, against fp32 on one."""
    ids = torch.randint(3, 80, (2, 30), generator=torch.Generator().manual_seed(2)).cuda()
    mask, family = torch.ones_like(ids), qwen_cases.QWEN

    def context(dtype: torch.dtype, over: ParallelMesh) -> torch.Tensor:
        model = qwen_cases.tiny_text_encoder(28, 4).to("cuda", dtype)
        parallelize_text_encoder(model, family.needs_text_encoder(), over, "text_encoder")
        return family.needs_text_encoder().encode(family.needs_text_encoder().text_model(model), ids, mask, ()).float()

    exact = context(torch.float32, ONE)
    one, two = context(torch.bfloat16, ONE), context(torch.bfloat16, mesh)
    return {"one": relative_error(one, exact), "two": relative_error(two, exact)}


def main(path: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name in MODELS:
            exact = predict(name, torch.float32, ParallelismConfig(), ONE)[0]
            one = predict(name, torch.bfloat16, ParallelismConfig(), ONE)
            errors = {"one": worst_error(one, exact)}
            made: dict[str, list[list[bool]]] = {}
            for label, layout in LAYOUTS.items():
                mesh = build_mesh(layout, "cuda")
                errors[label] = worst_error(predict(name, torch.bfloat16, layout, mesh), exact)
                for described, speed in SPEEDS.items():
                    fast = build_mesh(layout, "cuda", copies.usable(speed.copy_engines))
                    outputs = predict(name, torch.bfloat16, layout, fast, speed)
                    errors[f"{label}, {described}"] = worst_error(outputs, exact)
                errors[f"{label} fp32"] = worst_error(predict(name, torch.float32, layout, mesh), exact)
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, decisions(name, layout, mesh))
                made[label] = everyone
            found[name] = {"errors": errors, "decisions": made}
        found["exchanges"] = compare_exchanges()
        found["text_encoder"] = text_error(build_mesh(LAYOUTS["TP-2"], "cuda"))
    if rank == 0:
        path.write_text(json.dumps(found, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
