"""What a step costs beyond the workers' own: from a host's tensors to the workers, and back.

A FLUX.2 whose latent and context have the true size (1024 x 1024: 128 x 64 x 64, and 512 x 15360), but whose
transformer is small, runs in a worker group as the nodes run it. Each step brings its context as a new tensor, as
samplers do. Timed are the client's `RemoteModel.predict` less what the slowest rank itself took, and, with
``--comfyui``, a step of a stock KSampler on a real server less the same: what 22 steps take over 2.
``python benchmarks/round_trip.py [--ranks 2] [--device cuda] [--comfyui]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_backend.config import ParallelismConfig
from parallel_backend.drawing.demo_model import (
    DemoSize,
    assemble_pipeline,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)
from parallel_backend.families import Conditioning
from parallel_backend.runtime.client.groups import acquire_model, close_groups
from parallel_backend.runtime.client.remote_model import RemoteModel
from parallel_backend.runtime.group_config import DTYPES, ModelConfig

SIZE = DemoSize(
    heads=8, head_dim=16, axes_dims_rope=(4, 4, 4, 4), double_blocks=1, single_blocks=1,
    text_hidden=5120, text_heads=8, text_kv_heads=8, text_head_dim=16, text_layers=4, text_intermediate=64,
    text_out_layers=(1, 2, 3),
    vae_channels=(8, 8, 16, 16), vae_norm_groups=4, vae_layers_per_block=1, dtype=torch.bfloat16,
)  # fmt: skip
FEW = 2
"""Steps of the shorter of two pictures."""


def make_pipeline(folder: Path) -> Path:
    """A pipeline folder of that size."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = new_tokenizer(["a red circle on a blue square"], vocab_size=512)
    models = {"text_encoder": new_text_encoder(SIZE, tokenizer), "vae": new_vae(SIZE)}
    pipeline = assemble_pipeline(tokenizer, transformer=new_transformer(SIZE), **models, dtype=SIZE.dtype)
    pipeline.save_pretrained(folder)
    return folder


def predict_steps(model: RemoteModel, steps: int, device: str) -> dict[str, float]:
    """Medians over steps, in ms: of a step as the client sees it, of the slowest rank's own, and of the difference."""
    dtype = getattr(torch, model.config.dtype)
    x = torch.randn(1, 128, 64, 64, device=device, dtype=dtype)
    context = torch.randn(1, 512, 3 * SIZE.text_hidden, device=device, dtype=dtype)
    timestep, guidance = (torch.full((1,), value, device=device) for value in (0.5, 4.0))
    seconds, first = [], 0.0
    for step in range(steps + 2):
        conditioning = Conditioning(context.clone(), tensors={"guidance": guidance})
        latent = x.clone()
        began = time.perf_counter()
        model.predict(latent, timestep, conditioning).to(device)
        seconds.append(time.perf_counter() - began)
        first = first or seconds[0]
        if step == 1:  # the first ones warm up, and send the context
            seconds.clear()
            model.reset_timings()
    own = list(model.seconds["workers"])
    beyond = [1000 * (whole - part) for whole, part in zip(seconds, own, strict=True)]
    return {
        "step_ms": 1000 * statistics.median(seconds),
        "workers_ms": 1000 * statistics.median(own),
        "beyond_ms": statistics.median(beyond),
        "beyond_most_ms": max(beyond),
        "first_ms": 1000 * first,
        "contexts_sent": len(model._kept),
    }


def client(folder: Path, ranks: int, steps: int, device: str, dtype: str) -> dict[str, float]:
    """`predict_steps` over a fresh group."""
    devices = "auto" if device == "cuda" else device
    config = ModelConfig.create(folder, ParallelismConfig(ulysses_size=ranks), devices, dtype)
    try:
        return predict_steps(acquire_model(config), steps, device)
    finally:
        close_groups()


def comfyui(folder: Path, ranks: int, steps: int) -> dict[str, float]:
    """A step of a KSampler on a real ComfyUI server, on the CPU."""
    from tests.comfyui.graphs import Graph, add_loader, add_prompt, run_well, save_latent
    from tests.comfyui.server import ComfyServer

    def draw(server: ComfyServer, count: int, seed: int) -> tuple[float, list[float], list[float]]:
        """Seconds of a picture, and of each step: as the client sees it, and of the workers' own."""
        graph = Graph()
        loader = add_loader(graph, folder.name, ulysses=ranks, tp=1)
        prompt = add_prompt(graph, loader)
        latent = graph.add("EmptyFlux2LatentImage", width=1024, height=1024, batch_size=1)
        sampled = graph.add(
            "KSampler", model=(loader, 0), positive=prompt, negative=prompt, latent_image=latent, seed=seed,
            steps=count, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        save_latent(graph, sampled)
        began = time.perf_counter()
        run_well(server, graph)
        took = time.perf_counter() - began
        after = Graph()
        report = after.add("HybridDiT_WorkersReport", model=(add_loader(after, folder.name, ulysses=ranks, tp=1), 0))
        text = run_well(server, after).outputs[str(report)]["text"][0]
        seconds = json.loads(text)["seconds"]
        return took, seconds["steps"][-count:], seconds["workers"][-count:]

    with ComfyServer(diffusers_folder=folder.parent) as server:
        draw(server, FEW, seed=1)  # loads
        rounds = []
        for number in range(3):
            short, *short_parts = draw(server, FEW, seed=2 * number + 2)
            long, *long_parts = draw(server, steps + FEW, seed=2 * number + 3)
            whole = 1000 * (long - short) / steps
            step, own = (
                1000 * (sum(more) - sum(fewer)) / steps for more, fewer in zip(long_parts, short_parts, strict=True)
            )
            rounds.append((whole, own, whole - own, whole - step))
    whole, own, beyond, others = (statistics.median(part) for part in zip(*rounds, strict=True))
    return {"step_ms": whole, "workers_ms": own, "beyond_ms": beyond, "comfyui_ms": others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="Ulysses ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the host's tensors and the ranks")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the model and the host's tensors; not on ComfyUI's server"
    )
    parser.add_argument("--comfyui", action="store_true", help="also on a real ComfyUI server")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hybrid-dit-bench-") as name:
        folder = make_pipeline(Path(name) / "round-trip")
        report = {"client": client(folder, arguments.ranks, arguments.steps, arguments.device, arguments.dtype)}
        if arguments.comfyui:
            report["comfyui"] = comfyui(folder, arguments.ranks, arguments.steps)
    for kind, figures in report.items():
        sent = f", {figures['contexts_sent']:.0f} context sent" if "contexts_sent" in figures else ""
        sent += f", {figures['comfyui_ms']:.2f} of them ComfyUI's and the sampler's" if "comfyui_ms" in figures else ""
        print(
            f"round trip ({kind}, {arguments.ranks} rank(s) on {arguments.device}): {figures['beyond_ms']:.2f} ms a "
            f"step beyond the workers' own {figures['workers_ms']:.1f} ms{sent}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
