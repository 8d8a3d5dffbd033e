"""``generate``: one picture from a pipeline folder of any family, drawn by worker processes on any layout."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..cache.config import parse_cache
from ..config import ParallelismConfig
from ..runtime.hosts import Hosts
from .speed import add_speed_arguments, speed_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--model", type=Path, required=True, help="a diffusers pipeline folder, of any family")
    add_common_arguments(parser, ulysses=1, tp=1, out=Path("picture.png"))


def add_common_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Declare what all commands that draw take, but ``--model``.

    Args:
        parser: of the subcommand.
        defaults: of this command, by argument; a prompt without one is required, and what else has none is chosen by
            the model's family.
    """

    def add(
        name: str, text: str, *, default: Any = None, otherwise: str = "what suits the model", **options: Any
    ) -> None:
        default = defaults.get(name, default)
        text = f"{text} (default: {otherwise if default is None else '%(default)s'})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **options)

    parser.add_argument(
        "--prompt", default=defaults.get("prompt"), required="prompt" not in defaults, help="what to draw"
    )
    add("negative_prompt", "what not to draw, for models with true CFG")
    parser.add_argument(
        "--image", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="reference images, to edit"
    )
    add("width", "pixels", type=int)
    add("height", "pixels", type=int)
    add("steps", "evaluations of the model", type=int)
    add("seed", "of the starting noise", type=int, default=1)
    add("guidance", "distilled guidance scale, for models such as FLUX.2", type=float)
    add("cfg", "true CFG scale, for models such as Qwen-Image; 1 is none", type=float)
    add("ulysses", "degree of Ulysses", type=int, default=1)
    add("ring", "degree of Ring", type=int, default=1)
    add("tp", "degree of tensor parallelism", type=int, default=1)
    add("devices", "auto (GPUs if there are enough, else the CPU), cpu, or GPUs such as 0,1", default="auto")
    add("dtype", "auto, bfloat16, float16 or float32", default="auto")
    add("nnodes", "number of hosts; on each other one, the command 'worker' has to run", type=int, default=1)
    add("rdzv_endpoint", "ADDRESS:PORT of this host, where the others find it", otherwise="there are none")
    add("port", "TCP port of the rendezvous; 0 takes a free one", type=int, default=0)
    add(
        "cache",
        "have steps skip blocks: quality, speed, or settings such as Fn_compute_blocks=4,residual_diff_threshold=0.2,"
        "taylorseer_order=1",
        metavar="PRESET",
        otherwise="every step is computed",
    )
    add_speed_arguments(parser)
    add("out", "the picture", type=Path)
    add("report", "a report of what it took, as JSON", type=Path, otherwise="none is written")


def run(arguments: argparse.Namespace) -> int:
    """Draw the picture; exit status 0."""
    # Degrees and thresholds are checked before torch is imported.
    layout = ParallelismConfig(arguments.ulysses, arguments.ring, arguments.tp)
    hosts = Hosts(arguments.nnodes, arguments.rdzv_endpoint or "")
    ranks = hosts.ranks_each(layout.world_size)
    speed = speed_of(arguments)
    cache = None if arguments.cache is None else parse_cache(arguments.cache)
    written = [path for path in (arguments.out, arguments.report) if path is not None]
    for path in written:
        if not path.resolve().parent.is_dir():
            raise ValueError(f"{path} cannot be written: the folder {path.resolve().parent} does not exist")

    # Imported here, so that other subcommands start where packages are missing.
    from PIL import Image

    if arguments.out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{arguments.out} cannot be written: its ending is none of a picture; take .png")

    import diffusers
    import transformers

    from ..cache.run import summarize
    from ..demo_model import demo_folder
    from ..image_request import ImageRequest, open_image
    from ..loading.pipeline_folder import open_pipeline_folder
    from ..runtime.group_config import ModelConfig
    from ..runtime.groups import acquire_model
    from ..sampling import check_request, draw

    # The libraries' bars would run through this command's own.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    folder = arguments.model or demo_folder()
    request = ImageRequest(
        arguments.prompt,
        arguments.width,
        arguments.height,
        arguments.steps,
        arguments.seed,
        arguments.guidance,
        arguments.cfg,
        arguments.negative_prompt,
        tuple(map(open_image, arguments.image)),
    )
    drawn = check_request(open_pipeline_folder(folder), request)  # before anything is started
    config = ModelConfig.create(
        folder, layout, _devices(arguments.devices, ranks), arguments.dtype, hosts=hosts, speed=speed
    )
    over = f" of {hosts.count} hosts" if hosts.several else ""
    print(f"{layout.name}: {layout.describe()} on {config.devices.kind}{over}, {config.dtype}, {speed.describe()}")

    bar = ProgressBar()
    model = acquire_model(config, bar.show, port=arguments.port)
    picture = draw(model, request, lambda done, total: bar.show("sampling", done, total, ""), cache)
    report = model.report()
    model.group.close()
    report["request"] = {**vars(drawn), "images": list(map(str, arguments.image)), "out": str(arguments.out)}
    report["seconds"]["total"] = time.perf_counter() - began
    picture.save(arguments.out)
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report, indent=2) + "\n")

    seconds = report["seconds"]
    print(
        f"start {seconds['start']:.1f} s, load {seconds['load']:.1f} s, text {seconds['text']:.2f} s, "
        f"evaluation {seconds['step_median']:.3f} s (median of {len(seconds['steps'])}), "
        f"decode {seconds['decode']:.2f} s"
    )
    if report["cache"] is not None:
        print(summarize(report["cache"]))
    for rank in report["ranks"]:
        weights = sum(rank["weight_bytes"].values())
        print(
            f"rank {rank['rank']} on {rank['device']}: {weights / 2**20:.1f} MiB of weights, "
            f"peak {rank['peak_bytes'] / 2**20:.0f} MiB"
        )
    print(f"wrote {' and '.join(map(str, written))}")
    return 0


def _devices(asked: str, ranks: int) -> str:
    """The devices that are asked for, or the CPU where ``auto`` finds some GPUs, but too few."""
    import torch

    if asked == "auto" and 0 < torch.cuda.device_count() < ranks:
        print(f"{ranks} ranks are more than the {torch.cuda.device_count()} GPU(s) here: they run on the CPU")
        return "cpu"
    return asked
