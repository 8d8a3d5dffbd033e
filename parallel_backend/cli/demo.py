"""``demo``: one picture from a prompt, drawn by worker processes on any layout, with a report of what it took."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ..cache.config import parse_cache
from ..config import ParallelismConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--ulysses", type=int, default=2, help="degree of Ulysses (default: %(default)s)")
    parser.add_argument("--ring", type=int, default=1, help="degree of Ring (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=2, help="degree of tensor parallelism (default: %(default)s)")
    parser.add_argument(
        "--devices",
        default="auto",
        help="auto (GPUs if there are enough, else the CPU), cpu, or GPUs such as 0,1 (default: %(default)s)",
    )
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32 (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="TCP port of the rendezvous; 0 takes a free one")
    parser.add_argument(
        "--model", type=Path, help="a diffusers pipeline folder (default: the small FLUX.2 that comes along)"
    )
    parser.add_argument("--prompt", default="a large red circle left of a small blue star on a grey background")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--width", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--height", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    parser.add_argument(
        "--cache",
        metavar="PRESET",
        help="have steps skip blocks: quality, speed, or settings such as Fn_compute_blocks=4,"
        "residual_diff_threshold=0.2,taylorseer_order=1 (default: every step is computed)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--report", type=Path, default=Path("demo.json"), help="the report (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture; exit status 0."""
    # Degrees and thresholds are checked before torch is imported.
    layout = ParallelismConfig(arguments.ulysses, arguments.ring, arguments.tp)
    cache = None if arguments.cache is None else parse_cache(arguments.cache)

    import diffusers
    import torch
    import transformers

    from ..cache.run import summarize
    from ..demo_model import demo_folder
    from ..loading.pipeline_folder import open_pipeline_folder
    from ..runtime.group_config import ModelConfig
    from ..runtime.groups import acquire_model
    from ..sampling import ImageRequest, draw, load_scheduler

    request = ImageRequest(
        arguments.prompt, arguments.width, arguments.height, arguments.steps, arguments.seed, arguments.guidance
    )
    for path in (arguments.out, arguments.report):
        if not path.resolve().parent.is_dir():
            raise ValueError(f"{path} cannot be written: the folder {path.resolve().parent} does not exist")
    # The libraries' bars would run through this command's own.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    folder = arguments.model or demo_folder()
    request.check(open_pipeline_folder(folder).family.latent_downscale)
    load_scheduler(folder)  # before anything is started
    devices = arguments.devices
    if devices == "auto" and 0 < torch.cuda.device_count() < layout.world_size:
        devices = "cpu"
        print(
            f"{layout.world_size} ranks are more than the {torch.cuda.device_count()} GPU(s) here: they run on the CPU"
        )
    config = ModelConfig.create(folder, layout, devices, arguments.dtype)
    print(f"{layout.name}: {layout.describe()} on {config.devices.kind}, {config.dtype}")

    bar = _Bar()
    model = acquire_model(config, bar.show, port=arguments.port)
    picture = draw(model, request, lambda done, total: bar.show("sampling", done, total, ""), cache)
    report = model.report()
    model.group.close()
    report["request"] = {**vars(request), "out": str(arguments.out)}
    report["seconds"]["total"] = time.perf_counter() - began
    picture.save(arguments.out)
    arguments.report.write_text(json.dumps(report, indent=2) + "\n")

    seconds = report["seconds"]
    print(
        f"start {seconds['start']:.1f} s, load {seconds['load']:.1f} s, text {seconds['text']:.2f} s, "
        f"step {seconds['step_median']:.3f} s (median of {request.steps}), decode {seconds['decode']:.2f} s"
    )
    if report["cache"] is not None:
        print(summarize(report["cache"]))
    for rank in report["ranks"]:
        weights = sum(rank["weight_bytes"].values())
        print(
            f"rank {rank['rank']} on {rank['device']}: {weights / 2**20:.1f} MiB of weights, "
            f"peak {rank['peak_bytes'] / 2**20:.0f} MiB"
        )
    print(f"wrote {arguments.out} and {arguments.report}")
    return 0


_BAR_WIDTH = 30
_UNITS = {"starting": "processes", "loading": "MiB", "sampling": "steps"}


class _Bar:
    """A progress bar for each stage; on a terminal it redraws its line, elsewhere it prints a line a stage."""

    def __init__(self) -> None:
        self.stage = self.finished = ""

    def show(self, stage: str, done: float, total: float, detail: str) -> None:
        unit = _UNITS.get(stage)
        if unit is None:
            return
        if unit == "MiB":
            done, total = done / 2**20, total / 2**20
        filled = round(_BAR_WIDTH * done / total) if total else 0
        line = (
            f"{stage:9} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {done:.0f}/{total:.0f} {unit} {detail}".rstrip()
        )
        finished = done >= total and self.finished != stage
        if sys.stdout.isatty():
            new = "\n" if self.stage and stage != self.stage else ""
            print(f"{new}\r{line}\033[K", end="\n" if finished and stage == "sampling" else "", flush=True)
        elif finished:
            print(line, flush=True)
        self.stage = stage
        if finished:
            self.finished = stage
