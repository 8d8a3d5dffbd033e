"""What `auto`, doctor and refusals expect of GPU memory at one rank, beside what a GPU shows.

Transformers of FLUX.2-dev's, Qwen-Image's and Wan 2.2's widths, with random bf16 weights at a quarter of the depth (the
estimate is that of the same depth), draw one step of the picture or video that layouts are judged by, and a VAE of
random weights decodes one. ``runtime`` is what the driver counts and the allocator does not have: a CUDA context and
libraries' workspaces. Measured above estimated is a layout that is said to fit and does not; far below it, one that is
refused without need. All four lines: ``python benchmarks/memory_estimates.py [--shapes flux2-dev,...] [--json FILE]``
on one GPU of 24 GiB and more; ``--device cpu`` counts the bytes of tensors of tiny sizes, to see that it runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_backend.bench.model import build_transformer, fill, make_inputs, transformer_config, weight_bytes
from parallel_backend.bench.shapes import Shape, shape_of
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Family
from parallel_backend.mesh import Axis, build_mesh
from parallel_backend.planning.memory import (
    GIB,
    RUNTIME_BYTES,
    transformer_activation_bytes,
    transformer_bytes,
    vae_activation_bytes,
)

SHAPES = ("flux2-dev", "qwen-image", "wan-14b", "wan-5b")
ONE = ParallelismConfig()
SHARE = 4
"""Of a model's depth, one of so many blocks is there."""
SMALL = (64, 64, 5)
"""Pixels and frames on the CPU."""


def shallow(shape: Shape) -> Shape:
    """A shape with a share of its blocks."""
    family, config = transformer_config(shape)
    full = family.transformer.build(config).config  # with diffusers' defaults
    return replace(shape, config={**shape.config, **{name: max(1, full[name] // SHARE) for name in shape.depths}})


def peak_of(work: Callable[[], Any], device: str) -> int:
    """Bytes that a piece of work takes at its peak beside what is there before it; its second turn counts."""
    if device == "cpu":
        from tests.wan_vae import PeakBytes

        with PeakBytes() as counted:
            work()
        return counted.peak
    work()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def decoder(family: Family, latent: torch.Tensor) -> Callable[[], Any]:
    """What decodes a latent ``[B, C, F, h, w]`` (``[B, C, h, w]``) as a worker of one rank does."""
    kind = family.needs_vae()
    vae = kind.build({}).to_empty(device=latent.device).float().eval()
    fill(vae, latent.device, torch.float32)
    for statistic in vae.buffers():
        statistic.fill_(1)
    if not kind.over_ranks:
        return lambda: kind.decode(vae, latent)
    config = dict(vae.config)

    def work() -> None:
        run, start = None, 0
        for count in kind.latent_pieces(latent.shape[2]):
            piece = latent[:, :, start : start + count]
            run = run or kind.start(vae, config, True, Axis(None, 1, 0), piece.shape)
            run.piece(piece)  # pictures go to the host
            start += count

    return work


@torch.no_grad()
def measure(name: str, device: str) -> dict[str, Any]:
    """Estimated and measured bytes of a shape."""
    shape = shallow(shape_of(name))
    family, _ = transformer_config(shape)
    reference = family.reference_model
    width, height, frames = reference.width, reference.height, reference.frames
    if name == "wan-5b":  # which draws larger videos than the family's reference does
        width, height, frames = shape.side, shape.height, shape.frames
    if device == "cpu":
        width, height, frames = SMALL[0], SMALL[1], SMALL[2] if frames > 1 else 1
    dtype, text = torch.bfloat16, reference.text_tokens
    model = build_transformer(shape, ONE, build_mesh(ONE, device), dtype)
    full = dict(model.config)
    x, inputs = make_inputs(shape, width, height, text, device, dtype, frames)
    tokens = family.transformer.latent_tokens(full, width, height, frames) + text
    step = functools.partial(family.transformer.evaluate, model, inputs, x)
    row: dict[str, Any] = {
        "shape": name,
        "size": f"{width} x {height}" + (f" x {frames}" if frames > 1 else ""),
        "weights": (transformer_bytes(family, full, ONE), weight_bytes(model)),
        "step": (transformer_activation_bytes(family, full, ONE, tokens), peak_of(step, device)),
    }
    del model, inputs, step
    gc.collect()
    if family.vae is not None:
        vae = family.vae
        latents = vae.latent_shape({})
        if x.shape[1] == latents.channels:
            pictures = max(1, latents.frames) if frames > 1 else 1
            row["decode"] = (
                vae_activation_bytes(family, dict(vae.build({}).config), width * height * pictures),
                peak_of(decoder(family, x.float()), device),
            )
    if device != "cpu":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        row["runtime"] = (RUNTIME_BYTES, total - free - torch.cuda.memory_reserved())
    return row


def line(row: dict[str, Any]) -> str:
    """Of a row: GiB estimated and measured of each part, and the ratio."""
    cells = [row["shape"], row.get("size", "")]
    for part in ("weights", "step", "decode", "runtime"):
        if part in row:
            estimated, measured = row[part]
            cells.append(f"{estimated / GIB:.2f} / {measured / GIB:.2f} ({measured / estimated:.2f})")
        else:
            cells.append("-")
    return "| " + " | ".join(cells) + " |" + (f" {row['error']}" if "error" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print("GiB estimated / measured (measured in estimated); `runtime` has other programs' memory in it, if any")
    print("| shape | size | weights | step | decode | runtime |\n|---|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.shapes.split(","):
        try:
            rows.append(measure(name, arguments.device))
        except Exception as error:  # others may do
            rows.append({"shape": name, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        print(line(rows[-1]), flush=True)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
