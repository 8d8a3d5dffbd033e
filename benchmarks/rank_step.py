"""Step time and peak memory of rank 0 in any layout, ours against cache-dit 1.5.3, at a model's true shape on one GPU.

torch's fake process group stands in for the other ranks: shapes, weights, activations and compute of rank 0 are true,
collectives move nothing (an all-gather copies rank 0's own part). So this compares what a rank does around the
exchanges, not the exchanges. Both sides run diffusers' module in bf16 with random weights, on the same inputs, with
cuDNN's attention. A side that fails is reported, and the others go on. Each measurement is a process of its own: a fake
process group cannot be changed in a process, and memory has to start clean; the sides take turns.
``python benchmarks/rank_step.py --shape qwen-image --layouts Ulysses-2,TP-2 [--compile] [--json FILE]``; it needs
cache-dit 1.5.3 and, for FLUX.2-dev, 80 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Conditioning, Family, Model, family_of_transformer
from parallel_backend.mesh import build_mesh
from parallel_backend.parallelize import parallelize_transformer

OURS, PEER = "ours", "cache-dit"
SHAPES = {
    # The transformer's class, pixels along a side by default, features of the context, what counts the blocks.
    "qwen-image": ("QwenImageTransformer2DModel", 1328, 3584, ("num_layers",)),
    "flux2-dev": ("Flux2Transformer2DModel", 1024, 15360, ("num_layers", "num_single_layers")),
}
RESULT = "rank_step result: "
"""Begins the line in which a measuring process says what it found."""
GIB = 2**30
KINDS = {
    "attention": re.compile("sdpa|fmha|flash", re.IGNORECASE),
    "GEMM": re.compile("gemm|nvjet|xmma|cutlass|splitk", re.IGNORECASE),
}
"""Kernels by their names, the first that fits; what fits none is the rest."""


def layout_of(name: str) -> ParallelismConfig:
    """The layout that `ParallelismConfig.name` calls so."""
    match = re.fullmatch(r"(?:USP-(\d+)-(\d+)|Ulysses-(\d+)|Ring-(\d+))?-?(?:TP-(\d+))?|single", name)
    usp_ulysses, usp_ring, ulysses, ring, tp = (int(degree or 1) for degree in match.groups()) if match else (0,) * 5
    layout = ParallelismConfig(ulysses_size=usp_ulysses * ulysses, ring_size=usp_ring * ring, tp_size=tp)
    if layout.name != name:
        raise ValueError(f"{name!r} names no layout; names are like Ulysses-4, TP-2, USP-2-2-TP-2, single")
    return layout


@torch.no_grad()
def fill(model: nn.Module, device: str) -> None:
    """Random bf16 weights on the device; what is on the meta device gets its memory there."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, parameter := nn.Parameter(weight, requires_grad=False))
            local_part(parameter).normal_(std=0.02)
    model.to(device)


def local_part(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, which cache-dit's tensor parallelism leaves as a DTensor."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def parallelize_peer(model: Model, layout: ParallelismConfig, attention: str, uneven: bool) -> None:
    """cache-dit's public way, with the degrees of a layout."""
    import cache_dit

    if layout.world_size == 1:
        cache_dit.set_attn_backend(model, attention)
        return
    degrees = {
        name: degree
        for name in ("ulysses_size", "ring_size", "tp_size")
        if (degree := getattr(layout, name)) > 1  # it has None for "not asked for"
    }
    if uneven and layout.ulysses_size > 1:
        degrees["ulysses_anything"] = True
    config = cache_dit.ParallelismConfig(**degrees)
    cache_dit.enable_cache(model, parallelism_config=config, attention_backend=attention)


def mend_peer(model: Model, head_dim: int) -> bool:
    """Repair what keeps cache-dit 1.5.3 from running Qwen-Image under tensor parallelism; False if that is not it.

    It divides an attention's ``heads``, but not ``inner_dim``; diffusers 0.42 takes a head's width from their ratio.
    """
    broken = [
        module
        for block in model.transformer_blocks
        if hasattr(module := block.attn, "inner_dim") and module.inner_dim != module.heads * head_dim
    ]
    for module in broken:
        module.inner_dim = module.heads * head_dim
    return bool(broken)


def adapt_inputs_to_peer(model: Model, inputs: dict[str, Any], x: Tensor) -> None:
    """What diffusers' forward takes as it is, where ours takes something else."""
    for name in ("img_ids", "txt_ids"):  # cache-dit's plan for FLUX.2 wants them with a batch
        if name in inputs:
            inputs[name] = inputs[name][None]
    if "img_shapes" in inputs:
        inputs["img_shapes"] = [[(1, *(-(-side // model.config.patch_size) for side in x.shape[-2:]))]]
        # Its tables of positions are no buffers, so that they came to be on the meta device.
        model.pos_embed = type(model.pos_embed)(10000, list(model.config.axes_dims_rope), scale_rope=True)


def make_inputs(family: Family, width: int, height: int, text: int, features: int, device: str) -> tuple[Tensor, dict]:
    """A latent and the transformer's arguments for it, the same on both sides."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    down = family.latent_downscale
    frames = (1,) if family.name == "qwen_image" else ()
    x = random(1, family.latent_channels, *frames, height // down, width // down)
    tensors = {"guidance": torch.full((1,), 4.0, device=device)} if "guidance" in family.conditioning_tensors else {}
    timestep = torch.full((1,), 0.5, device=device)
    return x, family.transformer_inputs(x, timestep, Conditioning(random(1, text, features), tensors=tensors))


@torch.no_grad()
def measure(arguments: argparse.Namespace, layout: ParallelismConfig, side: str) -> dict[str, Any]:
    """Figures of rank 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU is for trying this out
    class_name, _, features, depths = SHAPES[arguments.shape]
    if layout.world_size > 1:
        dist.init_process_group("cpu:fake,cuda:fake", rank=0, world_size=layout.world_size, store=FakeStore())
    torch.manual_seed(0)
    family = family_of_transformer(class_name)
    config = dict(family.reference_model.transformer_config)
    if arguments.blocks:
        config |= dict.fromkeys(depths, arguments.blocks)
    model = family.build_transformer(config)
    x, inputs = make_inputs(family, arguments.width, arguments.height, arguments.text, features, device)
    figures: dict[str, Any] = {}
    began = time.perf_counter()
    if side == OURS:
        parallelize_transformer(model, family, layout, build_mesh(layout, device))
        fill(model, device)
    else:
        # Its planners want real weights, so the model is there in whole first. Its shards come out of a scatter, which
        # moves nothing here: they are filled anew.
        fill(model, device)
        adapt_inputs_to_peer(model, inputs, x)
        tokens = (inputs["hidden_states"].shape[1], arguments.text)
        uneven = any(count % layout.cp_size for count in tokens)
        if uneven and layout.ulysses_size > 1:
            figures["note"] = "ulysses_anything, since tokens do not divide"
        parallelize_peer(model, layout, arguments.peer_attention, uneven)
        fill(model, device)
    figures["weights_gib"] = sum(local_part(p).nbytes for p in model.parameters()) / GIB
    figures["build_s"] = time.perf_counter() - began
    if arguments.compile:
        model.compile_repeated_blocks()

    def step() -> Tensor:
        return family.prediction(model(**inputs, return_dict=False)[0], x)

    began = time.perf_counter()
    try:
        out = step()
    except RuntimeError as error:
        if side == OURS or layout.tp_size == 1 or not mend_peer(model, model.config.attention_head_dim):
            raise
        figures["note"] = (
            figures.get("note", "") + f"; as it is it fails ({first_line(error)}); measured with attn.inner_dim mended"
        ).removeprefix("; ")
        out = step()
    figures["finite"] = torch.isfinite(out).float().mean().item()
    if device == "cpu":
        figures["first_step_s"] = time.perf_counter() - began
        return figures
    figures["compiled_s" if arguments.compile else "first_step_s"] = time.perf_counter() - began
    for _ in range(arguments.warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    step()
    torch.cuda.reset_peak_memory_stats()
    # No wait between steps, as in a pipeline, so that the host runs ahead of the device where it can.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(arguments.steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    figures["step_ms"] = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    figures |= profile(step)
    return figures


def profile(step: Any) -> dict[str, Any]:
    """Time of one step's kernels by kind (ms), how many they are, the attention's names and the longest of the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = defaultdict(float)
    count, attention, rest = 0, set(), []
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        kind = next((kind for kind, names in KINDS.items() if names.search(event.key)), "rest")
        kinds[kind] += event.self_device_time_total / 1000
        count += event.count
        if kind == "attention":
            attention.add(event.key[:120])
        elif kind == "rest":
            rest.append([round(event.self_device_time_total / 1000, 2), event.count, event.key[:160]])
    longest = sorted(rest, reverse=True)[:12]
    return {"kernel_ms": dict(kinds), "kernels": count, "attention": sorted(attention), "longest_rest": longest}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '(nothing said)').splitlines()[0]}"


def in_process(arguments: argparse.Namespace, layout: str, side: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{layout},{side}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {arguments.timeout} s"}
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    said = done.stderr.strip().splitlines() or ["nothing said"]
    return {"error": f"exit code {done.returncode}: {said[-1]}"}


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A line a layout: medians over all rounds, spread from the fastest to the slowest step; ratios are peer / ours.

    Where the kernels' sum is far below the step, the host held the step up. Kernels run a little faster on numbers that
    are not finite, which the exchanges that move nothing can leave.
    """
    lines = [
        "| layout | side | step ms (spread) | kernels: GEMM + attention + rest = ms | of them | finite | weights GiB "
        "| peak GiB | note |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for layout in dict.fromkeys(row["layout"] for row in rows):
        medians, kernels, peaks = {}, {}, {}
        for side in (OURS, PEER):
            found = [row for row in rows if (row["layout"], row["side"]) == (layout, side)]
            good = [row for row in found if "step_ms" in row]
            if not good:
                if found:
                    said = found[-1].get("error", "not timed")
                    lines.append(f"| {layout} | {side} | | | | | | | {said} |".replace("\n", " "))
                continue
            times = [ms for row in good for ms in row["step_ms"]]
            medians[side], peaks[side] = statistics.median(times), max(row["peak_gib"] for row in good)
            last = good[-1]
            kernels[side] = sum(last["kernel_ms"].values())
            parts = " + ".join(f"{last['kernel_ms'].get(kind, 0):.1f}" for kind in ("GEMM", "attention", "rest"))
            lines.append(
                f"| {layout} | {side} | {medians[side]:.1f} ({min(times):.1f} to {max(times):.1f}) | "
                f"{parts} = {kernels[side]:.1f} | {last['kernels']} | {last['finite']:.2f} | "
                f"{last['weights_gib']:.2f} | {peaks[side]:.2f} | {last.get('note', '')} |"
            )
        if len(medians) == 2:
            lines.append(
                f"| {layout} | ratio | {medians[PEER] / medians[OURS]:.3f} | "
                f"{kernels[PEER] / kernels[OURS]:.3f} | | | | "
                f"{peaks[PEER] / peaks[OURS]:.3f} | cache-dit / ours |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen-image")
    parser.add_argument("--layouts", default="Ulysses-2,TP-2,TP-8,Ulysses-4-TP-2", help="default: %(default)s")
    parser.add_argument("--width", type=int, help="default: 1328 for qwen-image, 1024 for flux2-dev")
    parser.add_argument("--height", type=int, help="as --width")
    parser.add_argument("--text", type=int, default=512, help="tokens of text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="processes a side; which side goes first alternates")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the repeated blocks, on both sides")
    parser.add_argument("--blocks", type=int, help="of each kind instead of the true depth")
    parser.add_argument("--peer-attention", default="_sdpa_cudnn", help="backend (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a process may take (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.width = arguments.width or SHAPES[arguments.shape][1]
    arguments.height = arguments.height or SHAPES[arguments.shape][1]
    if arguments.one:
        layout, side = arguments.one.split(",")
        try:
            figures = measure(arguments, layout_of(layout), side)
        except Exception as error:
            figures = {"error": first_line(error)}
        print(RESULT + json.dumps(figures), flush=True)
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"device": device, "torch": torch.__version__, "arguments": vars(arguments) | {"json": None}}
    rows: list[dict[str, Any]] = []
    layouts = [layout_of(name).name for name in arguments.layouts.split(",")]
    for turn in range(arguments.rounds):
        for index, layout in enumerate(layouts):
            for side in (OURS, PEER) if (turn + index) % 2 == 0 else (PEER, OURS):
                began = time.perf_counter()
                row = {"layout": layout, "side": side, "turn": turn, **in_process(arguments, layout, side)}
                row["process_s"] = time.perf_counter() - began
                rows.append(row)
                print(json.dumps(row), flush=True)
                if arguments.json:  # each time, so that an interrupted run leaves what it has
                    arguments.json.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    how = "compiled" if arguments.compile else "eager"
    size = f"{arguments.width} x {arguments.height}, {arguments.text} tokens of text"
    print(f"\n{arguments.shape}, {size}, {how}, {device}")
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
