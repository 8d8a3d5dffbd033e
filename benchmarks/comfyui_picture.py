"""Seconds of a FLUX.2-dev picture in a real ComfyUI, from queueing to the latent, on any layout.

A pipeline folder with random weights at the true width and a share of the depth is written (and kept), a server is
started with it, and a KSampler draws pictures of 1024 x 1024 with prompts of their own: the first one loads.
``python benchmarks/comfyui_picture.py /tmp/weights --layout Ulysses-4-TP-2 [--steps 28] [--depth 1] [--json FILE]``
needs a ComfyUI (``COMFYUI_PATH``), a GPU a rank, and 62 GiB of disk; ``--small`` has a small model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.against_cache_dit import layout_of
from benchmarks.load_ranks import COMPLETE, write_pipeline
from benchmarks.round_trip import make_pipeline
from parallel_backend.config import ParallelismConfig
from tests.comfyui.graphs import Graph, add_latent, add_loader, add_prompt, add_sampler, run_well, save_latent
from tests.comfyui.server import ComfyServer

PICTURES = 3


def draw(server: ComfyServer, folder: str, layout: ParallelismConfig, steps: int, number: int) -> dict[str, Any]:
    """A picture with a prompt and a seed of its own: its seconds, and each step's as the client saw it, in ms."""
    degrees = {"ulysses": layout.ulysses_size, "ring": layout.ring_size, "tp": layout.tp_size}
    graph = Graph()
    loader = add_loader(graph, folder, **degrees)
    prompt = add_prompt(graph, loader, f"a red circle on a blue square, number {number}")
    sampled = add_sampler(
        graph, loader, positive=prompt, latent_image=add_latent(graph, 1024, 1024), seed=number, steps=steps
    )
    save_latent(graph, sampled)
    began = time.perf_counter()
    run_well(server, graph)
    seconds = time.perf_counter() - began
    after = Graph()
    report = after.add("HybridDiT_WorkersReport", model=(add_loader(after, folder, **degrees), 0))
    told = json.loads(run_well(server, after).outputs[str(report)]["text"][0])
    return {"seconds": seconds, "step_ms": [1000 * step for step in told["seconds"]["steps"][-steps:]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model is, or is written")
    parser.add_argument("--layout", default="Ulysses-4-TP-2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--depth", type=float, default=1.0, help="share of FLUX.2-dev's blocks (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="a small model instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the server; default: its own choice")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    layout, folder = layout_of(arguments.layout), arguments.folder / ("small" if arguments.small else "flux2")
    if arguments.small and not folder.exists():
        make_pipeline(folder)
    complete = folder / COMPLETE
    if not arguments.small and (not complete.exists() or complete.read_text() != str(arguments.depth)):
        write_pipeline(folder, arguments.depth)
    rows: list[dict[str, Any]] = []
    cpu = arguments.device == "cpu" or arguments.small
    with ComfyServer(diffusers_folder=folder.parent, arguments=("--cpu",) if cpu else ()) as server:
        for number in range(PICTURES):
            rows.append(draw(server, folder.name, layout, arguments.steps, number))
            steps = rows[-1]["step_ms"]
            print(
                f"{layout.name}, picture {number + 1}: {rows[-1]['seconds']:.2f} s, {len(steps)} steps of "
                f"{sum(steps) / len(steps):.1f} ms (the first {steps[0]:.0f})",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"layout": layout.name, "pictures": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
