"""``generate``: one picture from a pipeline folder or FLUX.2's files, drawn by worker processes on any layout."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache.config import parse_cache
from ..config import ParallelismConfig
from ..runtime.host_address import Hosts
from .speed import add_speed_arguments, speed_of

if TYPE_CHECKING:
    from ..runtime.client.remote_model import RemoteModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "--model", type=Path, required=True, help="a diffusers pipeline folder, or FLUX.2's transformer in one file"
    )
    parser.add_argument("--text-encoder", type=Path, metavar="FILE", help="its text encoder, with a transformer's file")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="its VAE, with a transformer's file")
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
    parser.add_argument(
        "--lora",
        type=_lora,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA files on the transformer, each with a strength (1 without one)",
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
        "have steps skip blocks: quality, speed, high_noise, low_noise, or settings such as "
        "Fn_compute_blocks=4,residual_diff_threshold=0.2,taylorseer_order=1",
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

    from ..cache.run import summarize
    from ..drawing.demo_model import demo_folder
    from ..drawing.image_request import ImageRequest, open_image
    from ..drawing.sampling import Models, check_request, draw, drawing_of_files, files_drawing
    from ..loading.checkpoint import open_checkpoint
    from ..loading.lora_file import read_loras
    from ..loading.pipeline_folder import PipelineFolder, open_pipeline_folder
    from ..loading.single_file import SingleFile
    from ..runtime.client.groups import acquire_model, add_user, remove_user
    from ..runtime.client.launcher import prepare
    from ..runtime.client.report import took
    from ..runtime.group_config import ModelConfig
    from .progress import ProgressBar

    began = time.perf_counter()
    paths = _files(arguments) or [arguments.model or demo_folder()]
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
    sources = [open_pipeline_folder(paths[0]) if len(paths) == 1 else open_checkpoint(paths[0])]
    if len(paths) > 1:
        files_drawing(sources[0].family, sources[0].path)  # before other files are looked at
        sources += map(open_checkpoint, paths[1:])
    for source in sources:
        prepare(source)  # beside what is imported here
    import diffusers
    import transformers

    # The libraries' bars would run through this command's own.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Before anything is started.
    folder = sources[0]
    drawn = (
        check_request(folder, request)
        if isinstance(folder, PipelineFolder)
        else request.complete(drawing_of_files(*sources))
    )
    assert isinstance(folder, PipelineFolder | SingleFile)
    adapters = read_loras(folder.family.transformer, folder.transformer_config, arguments.lora)
    devices = _devices(arguments.devices, ranks)
    configs = [
        ModelConfig.create(path, layout, devices, arguments.dtype, fp8, hosts=hosts, speed=speed)
        for path, fp8 in zip(paths, ("matmul", "stored", "cast"), strict=False)
    ]
    config = configs[0]
    over = f" of {hosts.count} hosts" if hosts.several else ""
    print(f"{layout.name}: {layout.describe()} on {config.devices.kind}{over}, {config.dtype}, {speed.describe()}")

    with ProgressBar() as bar, contextlib.ExitStack() as users:
        models = []
        for one in configs:
            add_user(one)  # or a model that has to make room would be dropped for good
            users.callback(remove_user, one)
            models.append(acquire_model(one, bar.show, port=arguments.port))
        drawing = models[0] if len(models) == 1 else Models.of_files(*models)
        picture = draw(drawing, request, lambda done, total: bar.show("sampling", done, total, ""), cache, adapters)
    report = _report(models)
    models[0].group.close()
    report["request"] = {
        **vars(drawn),
        "images": list(map(str, arguments.image)),
        "loras": [[str(path), strength] for path, strength in arguments.lora],
        "out": str(arguments.out),
    }
    report["seconds"]["total"] = time.perf_counter() - began
    picture.save(arguments.out)
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report, indent=2) + "\n")

    seconds = report["seconds"]
    before = took(seconds["start"], seconds["imports"], seconds["load"], seconds["compile"])
    print(
        f"{before}, text {seconds['text']:.2f} s, "
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


def _lora(text: str) -> tuple[Path, float]:
    """A LoRA's file and its strength, as they are given."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(strength)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is no file, and {strength!r} behind its colon is no strength; give FILE or FILE:0.8"
        ) from None


def _files(arguments: argparse.Namespace) -> list[Path]:
    """The files of transformer, text encoder and VAE; none for a folder.

    Raises:
        ValueError: some, but not all of them.
    """
    beside = {"--text-encoder": getattr(arguments, "text_encoder", None), "--vae": getattr(arguments, "vae", None)}
    if arguments.model is None or not arguments.model.is_file():
        given = [name for name, path in beside.items() if path is not None]
        if given:
            raise ValueError(f"{' and '.join(given)} go with a transformer's file, but --model is {arguments.model}")
        return []
    missing = [name for name, path in beside.items() if path is None]
    if missing:
        raise ValueError(
            f"{arguments.model} is one file; give the others, too: {' FILE and '.join(missing)} FILE, such as "
            "mistral_3_small_flux2_fp8.safetensors and flux2-vae.safetensors"
        )
    return [arguments.model, *filter(None, beside.values())]


def _report(models: Sequence[RemoteModel]) -> dict[str, Any]:
    """The first model's report, with what the others took."""
    report, *others = (model.report() for model in models)
    for other in others:
        report["seconds"]["load"] += other["seconds"]["load"]
        for name in ("text", "decode"):
            report["seconds"][name] += other["seconds"][name]
        for rank, same in zip(report["ranks"], other["ranks"], strict=True):
            rank["weight_bytes"] |= same["weight_bytes"]
            rank["peak_bytes"] = max(rank["peak_bytes"], same["peak_bytes"])
    return report


def _devices(asked: str, ranks: int) -> str:
    """The devices that are asked for, or the CPU where ``auto`` finds some GPUs, but too few."""
    import torch

    if asked == "auto" and 0 < torch.cuda.device_count() < ranks:
        print(f"{ranks} ranks are more than the {torch.cuda.device_count()} GPU(s) here: they run on the CPU")
        return "cpu"
    return asked
