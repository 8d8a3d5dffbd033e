"""What the products and the attention of a block take of a GPU that is at its power limit, each for some seconds.

At its limit a GPU lowers its clock until the power fits, and a product's time follows from its energy. Each is computed
over and over, on random numbers and then on zeros, for which hardly a wire switches: where zeros are faster, power
limits the product, and not the form in which it is computed. Shapes are those of a rank of FLUX.2-dev's single blocks.
``python benchmarks/gemm_power.py [--ranks 2] [--tokens 4608] [--seconds 3] [--json FILE]``; it needs ``nvidia-smi``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH, HEADS, HEAD_DIM, MLP = 6144, 48, 128, 18432
PRODUCTS = {
    "q, k, v": (WIDTH, 3 * WIDTH),
    "gate, up": (WIDTH, 2 * MLP),
    "out of attention": (WIDTH, WIDTH),
    "out of MLP": (MLP, WIDTH),
}
SETTLE_SECONDS = 1.0
"""After which the clock has come down."""
AHEAD = 50
"""Calls between two looks at the time."""

Fill = Callable[..., torch.Tensor]


def cases(tokens: int, ranks: int, fill: Fill) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """Name, floating-point operations, and what computes it, of each product of an Ulysses rank."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    local = tokens // ranks
    for name, (wide, out) in PRODUCTS.items():
        x, weight = fill(local, wide, **options), fill(out, wide, **options)
        yield f"{name}: {local} x {wide} x {out}", 2.0 * local * wide * out, lambda x=x, w=weight: F.linear(x, w)  # type: ignore[misc]
    q, k, v = (fill(1, HEADS // ranks, tokens, HEAD_DIM, **options) for _ in range(3))

    def attention() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    yield f"attention: {HEADS // ranks} heads, {tokens} tokens", 4.0 * tokens**2 * HEAD_DIM * HEADS / ranks, attention


def keep_busy(work: Callable[[], Any], seconds: float) -> float:
    """Compute something over and over; seconds that one took."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started, count = time.perf_counter(), 0
    begin.record()
    while time.perf_counter() - started < seconds:
        for _ in range(AHEAD):
            work()
        count += AHEAD
        torch.cuda.current_stream().synchronize()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / count


def measure(work: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Seconds of one, and medians of the GPU's watts and MHz meanwhile."""
    keep_busy(work, SETTLE_SECONDS)
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = "--query-gpu=power.draw.instant,clocks.sm"
    command = ["nvidia-smi", gpu, query, "--format=csv,noheader,nounits", "-lms", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        took = keep_busy(work, seconds)
        watcher.terminate()
        lines = watcher.communicate()[0].splitlines()
    samples = [tuple(map(float, line.split(","))) for line in lines if line.count(",") == 1]
    watts, mhz = (statistics.median(column) for column in zip(*samples, strict=True))
    return {"seconds": took, "watts": watts, "mhz": mhz}


def main() -> None:
    """Print a row for each product, and write all of them as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="of Ulysses (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4608, help="of the whole sequence (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    print("| product | numbers | TFLOPS | W | MHz | pJ an operation |\n|---|---|---:|---:|---:|---:|")
    rows = []
    for numbers, fill in (("random", torch.randn), ("zeros", torch.zeros)):
        for name, operations, work in cases(arguments.tokens, arguments.ranks, fill):
            row = {"product": name, "numbers": numbers, "operations": operations, **measure(work, arguments.seconds)}
            rows.append(row)
            print(
                f"| {name} | {numbers} | {operations / row['seconds'] / 1e12:.0f} | {row['watts']:.0f} | "
                f"{row['mhz']:.0f} | {1e12 * row['watts'] * row['seconds'] / operations:.2f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
