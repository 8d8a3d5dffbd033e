"""Memory and rank-local time of rank 0 for every layout of the reference table, FLUX.2-dev at its true shape, one GPU.

torch's fake process group stands in for the other ranks: shapes, weights, activations and compute of rank 0 are true,
collectives do nothing. Random bf16 weights; the text encoder is sharded over all ranks and stays resident, as does the
VAE (rank 0 has it). Run it as ``python benchmarks/layout_memory.py [--width 1024 --height 1024 --steps 5]``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLFlux2
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, family_of_name
from parallel_backend.mesh import build_mesh
from parallel_backend.parallelize import parallelize_transformer, shard_text_model, text_axes
from parallel_backend.planning.memory import GIB, LAYOUTS, reference_config


@torch.no_grad()
def fill(model: nn.Module) -> int:
    """Give a model on the meta device random bf16 weights on the GPU; bytes of its weights."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
    model.to("cuda")
    return sum(p.nbytes for p in model.parameters())


@torch.no_grad()
def measure(layout: ParallelismConfig, width: int, height: int, steps: int) -> dict[str, float]:
    """Figures of rank 0 for one layout, in GiB and milliseconds."""
    if layout.world_size > 1:
        dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    family = family_of_name("flux2")
    text_config = family.reference_model.text_config
    mesh = build_mesh(layout, "cuda")
    transformer = family.transformer.build(reference_config(family))
    parallelize_transformer(transformer, family.transformer, layout, mesh)
    text = family.needs_text_encoder().build(text_config)
    kind = family.needs_text_encoder()
    shard_text_model(text, kind, text_config, text_axes(kind, text_config, mesh)[0])
    figures = {"text_gib": fill(text) / GIB, "transformer_gib": fill(transformer) / GIB}
    vae = AutoencoderKLFlux2().to("cuda").eval()
    figures["vae_gib"] = sum(p.nbytes for p in vae.parameters()) / GIB

    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 1000, (1, 512), device="cuda")
    context = family.needs_text_encoder().encode(
        text, ids, torch.ones_like(ids), family.needs_text_encoder().layers(text_config)
    )
    figures["peak_text_gib"] = torch.cuda.max_memory_allocated() / GIB

    torch.cuda.reset_peak_memory_stats()
    x = torch.randn(1, 128, height // 16, width // 16, device="cuda", dtype=torch.bfloat16)
    inputs = family.transformer.inputs(
        x,
        torch.tensor([0.5], device="cuda"),
        Conditioning(context.bfloat16(), tensors={"guidance": torch.tensor([4.0], device="cuda")}),
    )
    times = []
    for _ in range(steps + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        family.transformer.evaluate(transformer, inputs, x)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    figures["peak_step_gib"] = torch.cuda.max_memory_allocated() / GIB
    figures["step_ms"] = statistics.median(times[2:])

    torch.cuda.reset_peak_memory_stats()
    family.needs_vae().decode(vae, x.float())
    figures["peak_decode_gib"] = torch.cuda.max_memory_allocated() / GIB
    if dist.is_initialized():
        dist.destroy_process_group()
    return figures


def main() -> None:
    """Print one row a layout as it is measured, and write all of them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.width} x {arguments.height}")
    columns = (
        "transformer_gib",
        "text_gib",
        "vae_gib",
        "peak_text_gib",
        "peak_step_gib",
        "peak_decode_gib",
        "step_ms",
    )
    print(f"{'layout':16}" + "".join(f"{column:>17}" for column in columns))
    results = {}
    for layout in LAYOUTS:
        name = layout.name
        results[name] = measure(layout, arguments.width, arguments.height, arguments.steps)
        print(f"{name:16}" + "".join(f"{results[name][column]:17.2f}" for column in columns), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
