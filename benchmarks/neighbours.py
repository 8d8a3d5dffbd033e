"""Pictures on a GPU of which others have most of the memory: what moves, and their seconds, beside ComfyUI's own.

A FLUX.2 transformer at its width and a quarter of its depth (16 GiB), a VAE and a text encoder (11 GiB), all with
random weights, are written (and kept); then memory of the GPU is taken until ``--leave`` GiB are free beside the
transformer: the contexts of two processes take 2 of them, where ComfyUI by itself has one of 0.8 GiB. Rows are drawn
one after another, each in a server of its own, all with ComfyUI's own VAE:

* ``ours``: Load Diffusion Model (Parallel) on GPU 0, five pictures,
* ``stock``: ComfyUI's Load Diffusion Model in its place,
* ``two loaders``: ours, and the text encoder on GPU 0, too, with room for one of them; each picture has its own prompt,
* ``ours --lowvram`` and so on: three pictures under each set of ComfyUI's flags,
* ``alternate``: pictures of ours and of ComfyUI's in turns, with room for one of them,
* ``stock --lowvram`` and so on.

The other rows get random numbers for a text's features. Seconds are ComfyUI's own, from the start of a prompt to its
end. ``python benchmarks/neighbours.py /tmp/weights [--leave 4] [--rows 'ours*,stock'] [--json FILE] [--seconds 230]``
needs a ComfyUI (``COMFYUI_PATH``), one GPU and 30 GiB of disk. No row is begun after ``--seconds``; what is in the JSON
file is not drawn again, and a row that failed is, last: call it until nothing is left. ``--small`` has tiny models on
the CPU, where nothing is taken (and --lowvram and --highvram are refused), to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.comfyui.graphs import Graph, add_latent, add_layout
from tests.comfyui.server import CHECKOUT, ComfyServer, ServerDied
from tests.single_file import flux2_shapes
from tests.text_encoder_file import text_tensors, write_text
from tests.vae_file import write_vae

GIB = 2**30
STEPS, WORDS = 4, 511
MANY, FEW = 5, 3
"""Pictures of a row; those after the second one count as the steady state."""
SIDES = ("ours", "stock", "two loaders", "alternate")
FLAGS = (
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
KINDS = {"transformer": "diffusion_models", "text": "text_encoders", "vae": "vae"}
WORKSPACE = 4 * GIB
"""Of a step, the runtime of two processes, and fragments: left free beside what is held."""
LIMIT = 1.10
"""Seconds of a picture of ours, in those of ComfyUI's."""
MOVES = re.compile(r"([\d.]+) GiB a rank of the (.*?) (moved to host memory|unloaded)|ComfyUI has ([\d.]+) GiB of GPU")
PICTURE_SECONDS = 240.0
TAIL = 40
"""Lines of a server's log that are kept of a row that failed."""


@dataclass(frozen=True)
class Row:
    """What one server draws: which graphs, and under which of ComfyUI's flags."""

    side: str
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.side, *self.flags))

    @property
    def pictures(self) -> int:
        return FEW if self.flags else MANY


ROWS = (
    *map(Row, SIDES[:3]),
    *(Row("ours", flags) for flags in FLAGS),
    Row("alternate"),
    *(Row("stock", flags) for flags in FLAGS),
)


def write_models(folder: Path, size: dict[str, dict[str, int]], kinds: Sequence[str]) -> dict[str, Path]:
    """The files that are asked for, by what they hold; those that are there are kept."""
    files = {name: folder / KINDS[name] / f"neighbours_{name}.safetensors" for name in kinds}
    for name, file in files.items():
        if file.exists():
            continue
        began = time.perf_counter()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        if name == "vae":
            write_vae(partial)
        elif name == "text":
            write_encoder(partial, **size["text"])
        else:
            shapes = flux2_shapes(**size["transformer"])
            shapes["txt_in.weight"] = (shapes["txt_in.weight"][0], features_of(size))
            save_file({weight: _random(shape) for weight, shape in shapes.items()}, partial)
        partial.rename(file)
        print(f"{file}: {file.stat().st_size / GIB:.1f} GiB in {time.perf_counter() - began:.0f} s", flush=True)
    return files


def features_of(size: dict[str, dict[str, int]]) -> int:
    """Of a text's token."""
    return 3 * size["text"].get("hidden", 64)


def write_encoder(path: Path, **size: int) -> None:
    """A text encoder in bf16; of a large one all layers have the shapes of the first, which alone is drawn slowly."""
    if not size:
        write_text(path, "bf16")
        return
    first, layers = "model.layers.0.", 30
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in text_tensors(layers=1, **size).items():
        if not name.startswith(first):
            tensors[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        for layer in range(layers):
            tensors[name.replace(first, f"model.layers.{layer}.")] = _random(tuple(tensor.shape))
    save_file(tensors, path)


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(shape, dtype=torch.bfloat16, device=device) * shape[1] ** -0.5).cpu()


def graph_of(side: str, files: dict[str, Path], number: int, pixels: int, device: str, features: int) -> Graph:
    """A picture, with a seed of its own."""
    graph = Graph()
    on_gpu = add_layout(graph, ulysses=1, tp=1, devices=device)
    if side == "two loaders":
        clip = graph.add("HybridDiT_LoadCLIP", clip_name=files["text"].name, type="flux2", layout=on_gpu)
        prompt = graph.add("CLIPTextEncode", text=f"number {number}", clip=clip)
    else:
        prompt = graph.add("ReferenceText", text=" ".join(["word"] * WORDS), features=features)
    name = files["transformer"].name
    if side == "stock" or (side == "alternate" and number % 2):
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
    """Memory of GPU 0, until so many bytes are left; waits for what servers before have had."""
    free, total = torch.cuda.mem_get_info(0)
    deadline = time.monotonic() + 20
    while free < 0.95 * total and time.monotonic() < deadline:
        time.sleep(0.2)
        free, total = torch.cuda.mem_get_info(0)
    return torch.empty(free - leave, dtype=torch.uint8, device="cuda:0") if free > leave else None


def moves(log: str) -> list[str]:
    """What a server's log says of weights that moved, and of memory that was given."""
    return [found.group(0) for found in MOVES.finditer(log)]


def run(server: ComfyServer, graph: Graph) -> float:
    """Seconds of a graph, as ComfyUI's history has them; it is asked for, so that no websocket library is needed."""
    prompt = server.queue(graph, uuid.uuid4().hex)
    deadline = time.monotonic() + PICTURE_SECONDS
    while time.monotonic() < deadline:
        status = server.get(f"/history/{prompt}", timeout=60).get(prompt, {}).get("status")
        if status:
            told = dict(status["messages"])
            if status["status_str"] != "success":
                failure = told.get("execution_error", {})
                raise RuntimeError(f"{failure.get('node_type')}: {failure.get('exception_message', status)}")
            return (told["execution_success"]["timestamp"] - told["execution_start"]["timestamp"]) / 1000
        if server.process is None or server.process.poll() is not None:
            raise ServerDied("ComfyUI ended while it drew")
        time.sleep(0.02)
    raise TimeoutError(f"no picture within {PICTURE_SECONDS:.0f} s")


def draw(row: Row, files: dict[str, Path], pixels: int, device: str, features: int) -> dict[str, Any]:
    """Pictures in a server of their own: seconds and moves of each; an error ends the row, and is told."""
    drawn: dict[str, Any] = {"name": row.name, "pictures": []}
    arguments = (*(("--cpu",) if device == "cpu" else ()), *row.flags)
    server = ComfyServer(arguments=arguments, packs=(CHECKOUT / "tests" / "comfyui" / "reference_pack",))
    try:
        began = time.perf_counter()
        server.start()
        drawn["start"] = time.perf_counter() - began
        for name, file in files.items():
            folder = server.models / KINDS[name]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to(file.resolve())
        for number in range(row.pictures):
            before = len(server.log_text())
            seconds = run(server, graph_of(row.side, files, number, pixels, device, features))
            said = server.log_text()[before:]
            picture = {"seconds": seconds, "moves": moves(said), "tiled": "retrying with tiled" in said}
            if device != "cpu":
                picture["free"] = torch.cuda.mem_get_info(0)[0] / GIB
            drawn["pictures"].append(picture)
    except Exception as error:  # whatever it is: other rows may do
        drawn["error"] = f"{type(error).__name__}: {error}"
        drawn["log"] = server.log_tail(TAIL)
    finally:
        server.stop()
    return drawn


def line(row: dict[str, Any]) -> str:
    """Of a row: seconds of each picture, what moved in which, and the error that ended it."""
    seconds = ", ".join(f"{picture['seconds']:.2f}" for picture in row["pictures"])
    said = [
        f"{number}: {'; '.join([*picture['moves'], *['tiled decoding'] * picture['tiled']])}"
        for number, picture in enumerate(row["pictures"], 1)
        if picture["moves"] or picture["tiled"]
    ]
    told = row.get("error", "").strip().splitlines()
    error = " ... ".join(told[:1] + told[1:][-1:])[:300]
    return f"| {row['name']} | {seconds or '-'} | {', '.join(said) or 'none'} | {error or '-'} |"


def steady(row: dict[str, Any]) -> float:
    """Seconds of a picture after the second one."""
    return statistics.median(picture["seconds"] for picture in row["pictures"][2:])


def compared(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each set of flags with which both sides have drawn, and what ours moved after the second picture."""
    lines = []
    for name, ours in rows.items():
        stock = rows.get(name.replace("ours", "stock", 1))
        if not name.startswith("ours") or "error" in ours or stock is None or "error" in stock:
            continue
        late = sum(len(picture["moves"]) for picture in ours["pictures"][2:])
        ratio = steady(ours) / steady(stock)
        lines.append(
            f"{name.removeprefix('ours').strip() or 'no flags'}: {steady(ours):.2f} s a picture, stock "
            f"{steady(stock):.2f} s: {ratio:.2f} times ({'within' if ratio <= LIMIT else 'ABOVE'} {LIMIT:.2f}); "
            f"moves after the second picture: {late}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are, or are written")
    parser.add_argument("--leave", type=float, default=4.0, help="GiB that others leave free (default: %(default)s)")
    parser.add_argument("--pixels", type=int, help="along a side of the picture (default: 1024; small: 64)")
    parser.add_argument("--rows", default="*", help="patterns of names, with commas between them (default: all)")
    parser.add_argument("--seconds", type=float, default=230.0, help="no row is begun later (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--json", type=Path, help="where rows are kept, and not drawn again")
    arguments = parser.parse_args()
    began = time.monotonic()
    size = SMALL if arguments.small else FULL
    device, pixels = ("cpu", arguments.pixels or 64) if arguments.small else ("0", arguments.pixels or 1024)
    patterns = [pattern.strip() for pattern in arguments.rows.split(",")]
    chosen = [row for row in ROWS if any(fnmatchcase(row.name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"no row is called {arguments.rows!r}; there are: {', '.join(row.name for row in ROWS)}")
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in known}
    left = [row for row in chosen if row.name not in rows]
    # Last, or one that never works is all there is.
    left += [row for row in chosen if "error" in rows.get(row.name, ())]
    print("| row | seconds of its pictures | moves | error |\n|---|---|---|---|", flush=True)
    while left and time.monotonic() - began < arguments.seconds:
        row = left.pop(0)
        two = row.side == "two loaders"
        folder = arguments.folder / ("small" if arguments.small else "full")
        files = write_models(folder, size, tuple(KINDS) if two else ("transformer", "vae"))
        held = max(file.stat().st_size for file in files.values())
        leave = held + (WORKSPACE if two else round(arguments.leave * GIB))
        torch.cuda.empty_cache()
        taken = None if arguments.small else take(leave)
        rows[row.name] = {**draw(row, files, pixels, device, features_of(size)), "left": leave / GIB}
        del taken
        print(line(rows[row.name]), flush=True)
        if "error" in rows[row.name]:
            print(rows[row.name]["log"], file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    print("\n".join(compared(rows)))
    if left:
        print(f"not begun: {', '.join(row.name for row in left)}; call it again")


if __name__ == "__main__":
    main()
