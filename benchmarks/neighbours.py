"""Five pictures on a GPU of which others have most of the memory: what moves, and their seconds, beside ComfyUI's own.

A FLUX.2 transformer at its width and a quarter of its depth (16 GiB), a VAE and a text encoder (11 GiB), all with
random weights, are written (and kept); then memory of the GPU is taken until ``--leave`` GiB are free beside the
transformer. Three graphs draw with ComfyUI's own VAE, each in a server of its own, under each set of ComfyUI's flags:

* ``ours``: Load Diffusion Model (Parallel) on GPU 0,
* ``stock``: ComfyUI's Load Diffusion Model in its place,
* ``two loaders``: ours, and the text encoder on GPU 0, too, with room for one of them; each picture has its own prompt.

``python benchmarks/neighbours.py /tmp/weights [--leave 3] [--json FILE]`` needs a ComfyUI (``COMFYUI_PATH``), one GPU
and 30 GiB of disk; ``--small`` has tiny models on the CPU, where nothing is taken, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.comfyui.graphs import Graph, add_latent, add_layout, run_well
from tests.comfyui.server import ComfyServer
from tests.single_file import flux2_shapes
from tests.text_encoder_file import write_text
from tests.vae_file import write_vae

GIB = 2**30
PICTURES, STEPS = 5, 4
SIDES = ("ours", "stock", "two loaders")
FLAGS = (
    (),
    ("--disable-dynamic-vram",),
    ("--lowvram",),
    ("--highvram",),
    ("--disable-smart-memory",),
    ("--reserve-vram", "2"),
    ("--cache-none",),
    ("--cache-lru", "3"),
)
FULL = {"transformer": {"heads": 48, "double": 2, "single": 12}, "text": {"heads": 32, "kv_heads": 8, "hidden": 5120}}
SMALL = {"transformer": {"heads": 2, "double": 1, "single": 1}, "text": {}}
WORKSPACE = 4 * GIB
"""Of a step, the runtime of two processes, and fragments: left free beside what is held."""
MOVES = re.compile(r"([\d.]+) GiB a rank of the (.*?) (moved to host memory|unloaded)|ComfyUI has ([\d.]+) GiB of GPU")


def write_models(folder: Path, size: dict[str, dict[str, int]]) -> dict[str, Path]:
    """The three files, by what they hold; those that are there are kept."""
    files = {name: folder / kind / f"neighbours_{name}.safetensors" for name, kind in KINDS.items()}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    hidden = size["text"].get("hidden", 64)
    if not files["transformer"].exists():
        shapes = flux2_shapes(**size["transformer"])
        shapes["txt_in.weight"] = (shapes["txt_in.weight"][0], 3 * hidden)
        save_file({name: _random(shape) for name, shape in shapes.items()}, files["transformer"])
    if not files["text"].exists():
        write_text(files["text"], "bf16", **size["text"])
    if not files["vae"].exists():
        write_vae(files["vae"])
    return files


KINDS = {"transformer": "diffusion_models", "text": "text_encoders", "vae": "vae"}


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16) * shape[1] ** -0.5


def graph_of(side: str, files: dict[str, Path], number: int, pixels: int, device: str) -> Graph:
    """A picture, with a seed of its own."""
    graph = Graph()
    one = {"ulysses": 1, "tp": 1}
    on_gpu = add_layout(graph, **one, devices=device)
    beside = on_gpu if side == "two loaders" else add_layout(graph, **one, devices="cpu")
    clip = graph.add("HybridDiT_LoadCLIP", clip_name=files["text"].name, type="flux2", layout=beside)
    words = f"number {number}" if side == "two loaders" else "a red circle"
    prompt = graph.add("CLIPTextEncode", text=words, clip=clip)
    name = files["transformer"].name
    if side == "stock":
        model = graph.add("UNETLoader", unet_name=name, weight_dtype="default")
    else:
        model = graph.add("HybridDiT_LoadDiffusionModel", unet_name=name, layout=on_gpu, weight_dtype="default")
    sampled = graph.add(
        "KSampler", model=model, positive=prompt, negative=prompt, latent_image=add_latent(graph, pixels, pixels),
        seed=number, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    vae = graph.add("VAELoader", vae_name=files["vae"].name)
    image = graph.add("VAEDecode", samples=sampled, vae=vae)
    graph.add("SaveImage", images=image, filename_prefix="neighbours")
    return graph


def take(leave: int) -> torch.Tensor | None:
    """Memory of GPU 0, until so many bytes are left."""
    free, _ = torch.cuda.mem_get_info(0)
    return torch.empty(free - leave, dtype=torch.uint8, device="cuda:0") if free > leave else None


def moves(log: str) -> list[str]:
    """What a server's log says of weights that moved, and of memory that was given."""
    return [found.group(0) for found in MOVES.finditer(log)]


def draw(
    side: str, flags: Sequence[str], files: dict[str, Path], pixels: int, device: str, models: Path
) -> list[dict[str, Any]]:
    """Pictures in a server of their own: seconds and moves of each."""
    rows: list[dict[str, Any]] = []
    with ComfyServer(arguments=(*(("--cpu",) if device == "cpu" else ()), *flags)) as server:
        for kind in KINDS.values():
            link = server.models / kind
            link.mkdir(parents=True, exist_ok=True)
            for file in (models / kind).iterdir():
                (link / file.name).symlink_to(file.resolve())
        for number in range(PICTURES):
            before = len(server.log_text())
            began = time.perf_counter()
            run_well(server, graph_of(side, files, number, pixels, device), timeout=1800)
            seconds = time.perf_counter() - began
            said = server.log_text()[before:]
            rows.append({"seconds": seconds, "moves": moves(said), "tiled": "retrying with tiled" in said})
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """A line for each side and set of flags: seconds of each picture, and what moved in which."""
    lines = ["| flags | graph | seconds of pictures 1 to 5 | moves |", "|---|---|---|---|"]
    for row in rows:
        seconds = ", ".join(f"{picture['seconds']:.2f}" for picture in row["pictures"])
        said = [
            f"{number}: {'; '.join([*picture['moves'], *['tiled decoding'] * picture['tiled']])}"
            for number, picture in enumerate(row["pictures"], 1)
            if picture["moves"] or picture["tiled"]
        ]
        lines.append(
            f"| {' '.join(row['flags']) or 'none'} | {row['side']} | {seconds} | {', '.join(said) or 'none'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are, or are written")
    parser.add_argument("--leave", type=float, default=3.0, help="GiB that others leave free (default: %(default)s)")
    parser.add_argument("--pixels", type=int, help="along a side of the picture (default: 1024; small: 64)")
    parser.add_argument("--sides", default=",".join(SIDES), help="graphs to draw (default: %(default)s)")
    parser.add_argument("--flags", help="of ComfyUI, instead of all sets of them; empty: none")
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = arguments.folder / ("small" if arguments.small else "full")
    files = write_models(models, SMALL if arguments.small else FULL)
    device, pixels = ("cpu", arguments.pixels or 64) if arguments.small else ("0", arguments.pixels or 1024)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    rows: list[dict[str, Any]] = []
    for flags in FLAGS if arguments.flags is None else (tuple(arguments.flags.split()),):
        for side in arguments.sides.split(","):
            held = max(sizes["transformer"], sizes["text"]) if side == "two loaders" else sizes["transformer"]
            extra = WORKSPACE if side == "two loaders" else round(arguments.leave * GIB)
            taken = None if arguments.small else take(held + extra)
            pictures = draw(side, flags, files, pixels, device, models)
            rows.append({"flags": flags, "side": side, "left": held + extra, "pictures": pictures})
            print(report(rows[-1:]).splitlines()[-1], flush=True)
            del taken
            if not arguments.small:
                torch.cuda.empty_cache()
    print(report(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
