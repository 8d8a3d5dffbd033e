"""``doctor``: what this machine can run, which layouts of a model fit it, and what to change if something is off."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config import ParallelismConfig
from ..machine import Gpu, Link, Machine, collect
from ..requirements import REQUIRED, problems
from .doctor_comfyui import check_comfyui, in_its_python
from .doctor_models import check_models
from .surroundings import surroundings

if TYPE_CHECKING:
    from ..families import Family
    from ..planning.auto_layout import Choice, Option
    from ..planning.memory import LayoutFit

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: ``level`` is ok, warn or FAIL; all but ok come with a remedy where there is one."""

    level: str
    text: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    # Names are not declared as choices: the doctor has to start where diffusers, which they need, cannot be imported.
    parser.add_argument(
        "--model", default="flux2", help="a model's name, or a part of it, such as qwen (default: %(default)s)"
    )
    parser.add_argument("--ulysses", type=int, help="check one layout: its degree of Ulysses")
    parser.add_argument("--ring", type=int, help="check one layout: its degree of Ring")
    parser.add_argument("--tp", type=int, help="check one layout: its degree of tensor parallelism")
    parser.add_argument("--devices", default="auto", help="auto, cpu, or GPUs such as 0,1 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--comfyui",
        metavar="PATH",
        help="check the ComfyUI in this folder too, and all else in the Python that runs it",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; exit status 0 if this machine, and the layout if one is given, can run."""
    if args.comfyui:
        status = in_its_python(args)
        if status is not None:
            return status
    degrees = (args.ulysses, args.ring, args.tp)
    layout = ParallelismConfig(*degrees) if any(degree is not None for degree in degrees) else None
    machine = collect()
    findings = [*check_machine(machine), *(Finding(*found) for found in surroundings(machine))]
    if args.comfyui:
        of_comfyui = (*check_comfyui(args.comfyui), *check_models(args.comfyui))
        findings += [Finding(*found) for found in of_comfyui]
    rows: list[LayoutFit] = []
    model = sample = ""
    choice: Choice | None = None
    if machine.versions["torch"] is not None:
        try:
            gpus = choose_gpus(machine, args.devices, layout)
            findings.append(check_quantized())
            from ..families import family_of_name
            from ..planning.memory import LAYOUTS, layout_fits

            family = family_of_name(args.model)
            model, sample = family.reference_model.name, family.reference_model.sample
            if layout is not None:
                findings += check_layout(family, layout, machine, gpus)
            rows = layout_fits(family, [layout] if layout else LAYOUTS, [(gpu.total, gpu.free) for gpu in gpus])
            findings += check_memory(family, layout, machine, gpus, rows)
            findings += check_formats(family, gpus) if layout is None else []
            if gpus and layout is None:
                choice = choose(family, machine, gpus)
                findings += [Finding("ok", f"auto takes {choice.reason}")] if choice else []
        except ValueError as error:
            findings.append(Finding("FAIL", str(error)))
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            findings.append(check_companions() or not_imported(error))
    failed = any(finding.level == "FAIL" for finding in findings)
    if args.json:
        report = {"version": __version__, "ok": not failed, "layout": layout.name if layout else None}
        report |= {"model": model}
        report |= {"machine": asdict(machine), "findings": list(map(asdict, findings)), "rows": list(map(asdict, rows))}
        report |= {"auto": choice and [_option(option) for option in choice.options]}
        print(json.dumps(report, indent=2))
    else:
        print(render(machine, findings, rows, layout, f"{model}, bfloat16, {sample}", choice))
    return int(failed)


# The checks.


def check_machine(machine: Machine) -> list[Finding]:
    """Whether workers can run here at all, whatever the layout."""
    found = []
    for problem in problems(machine.versions):
        found.append(Finding("FAIL", problem.text, problem.remedy))
    if not found:
        found.append(Finding("ok", f"versions of {', '.join(REQUIRED)}"))
    if not machine.memfd:
        remedy = "run ComfyUI on Linux (WSL 2 will do)"
        found.append(Finding("FAIL", "this system has no memfd_create, which tensors are passed through", remedy))
    if machine.versions.get("torch") and not machine.gloo:
        remedy = "install an official build of torch: https://pytorch.org/get-started"
        found.append(Finding("FAIL", "torch was built without gloo, which ranks talk through", remedy))
    if len(machine.gpus) > 1 and machine.nccl is None:
        remedy = "install a CUDA build of torch for Linux: https://pytorch.org/get-started"
        found.append(Finding("FAIL", "torch was built without NCCL, which GPUs talk through", remedy))
    if machine.gpus and machine.missing_build_tools:
        text = f"no {machine.missing_build_tools}: elementwise work runs slower, and compile is refused"
        found.append(Finding("warn", text, "install it"))
    if machine.driver_gpus and not machine.gpus:
        found.append(_hidden_gpus(machine))
    apart = [f"{link.first}-{link.second}" for link in machine.links if not link.peer_access]
    if apart:
        text = f"no peer access between GPUs {', '.join(apart)}: what they exchange goes through host memory"
        remedy = "prefer Ring or Ulysses to TP, which talks most; switch off ACS in the BIOS"
        found.append(Finding("warn", text, remedy))
        if machine.shm_free is not None and machine.shm_free < GIB:
            text = f"/dev/shm has {machine.shm_free / GIB:.2f} GiB free, and NCCL may exchange through it between them"
            found.append(Finding("warn", text, "in Docker, start with --shm-size=1g or --ipc=host"))
    if machine.environment.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        text = "NCCL_P2P_DISABLE is set: GPUs exchange through host memory even where NVLink connects them"
        found.append(Finding("warn", text, "unset NCCL_P2P_DISABLE, unless GPUs hang without it"))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "cudaMallocAsync" in machine.environment.get(name, ""):
            text = f"{name} asks for cudaMallocAsync, which runs out of memory under NCCL; our workers drop it"
            found.append(Finding("ok", text))
    return found


def choose_gpus(machine: Machine, spec: str, layout: ParallelismConfig | None) -> list[Gpu]:
    """The GPUs that ``--devices`` means, in rank order; none for the CPU.

    Raises:
        ValueError: GPUs that are not there, or not as many as the layout has ranks.
    """
    from ..planning.devices import gpu_numbers, resolve_devices

    named = gpu_numbers(spec)
    count = layout.world_size if layout else len(named or machine.gpus)
    if resolve_devices(spec, count).kind == "cpu":
        return []
    return [machine.gpus[index] for index in named or range(count)]


def check_layout(family: Family, layout: ParallelismConfig, machine: Machine, gpus: list[Gpu]) -> list[Finding]:
    """Whether the ranks of a layout have a device each and the heads divide over it.

    Raises:
        ValueError: the family's reference model cannot be split so.
    """
    from ..planning.memory import reference_config

    config = reference_config(family)
    family.transformer.check_layout(config, layout)
    if gpus:
        layout.check_world(len(gpus))
        heads = config["num_attention_heads"]
        return [Finding("ok", f"{layout.name}: {heads} heads divide over {layout.world_size} rank(s), a GPU each")]
    from ..drawing.demo_model import DEMO_SIZE

    layout.check_heads(DEMO_SIZE.heads, "the demo model, which is what fits a CPU,")
    found = [Finding("ok", f"{layout.name}: {layout.world_size} rank(s) run the demo model on the CPU")]
    if layout.world_size > machine.cores:
        text = f"{layout.world_size} ranks share {machine.cores} CPU core(s) and take turns"
        remedy = f"expect it to be slow, or lower the degrees to a product of {machine.cores}"
        found.append(Finding("warn", text, remedy))
    return found


def check_memory(
    family: Family, layout: ParallelismConfig | None, machine: Machine, gpus: list[Gpu], rows: list[LayoutFit]
) -> list[Finding]:
    """Whether the family's reference model fits: with the layout that was asked for, or with any."""
    from ..planning.memory import reference_memory, what_fits

    model = family.reference_model.name
    if not gpus:
        need = reference_memory(family, ParallelismConfig()).total / GIB
        have = (machine.memory_total or 0) / GIB
        if need <= have:
            return [Finding("ok", f"{model} in bfloat16 ({need:.0f} GiB) fits {have:.0f} GiB of memory, on one rank")]
        text = f"without GPUs, {model} in bfloat16 ({need:.0f} GiB) does not fit {have:.0f} GiB of memory"
        return [Finding("warn", text, f"run the demo model on this machine, and {model} on one with GPUs")]
    fitting = [row.name for row in rows if row.fits == "yes"]
    if fitting:
        return [Finding("ok", f"{model} fits with {', '.join(fitting)}")]
    row = min(rows, key=lambda row: (row.fits != "busy", row.total))
    used = gpus[: row.ranks]
    fullest = min(used, key=lambda gpu: gpu.free)
    text = (
        f"{model} does not fit: {row.name} needs {row.total:.1f} GiB per GPU, GPU {fullest.index} has "
        f"{_gib(fullest.free)} free of {_gib(fullest.total)}"
    )
    remedy = "end the other programs on these GPUs (nvidia-smi lists them)"
    if row.fits == "no":
        remedy = what_fits(family, min(gpu.total for gpu in used), row.ranks)
    # A machine whose GPUs are too small for this model still runs smaller models.
    return [Finding("FAIL" if layout else "warn", text, remedy)]


def check_formats(family: Family, gpus: list[Gpu]) -> list[Finding]:
    """What these GPUs take of the family's reference model in each format; without GPUs, what some others would."""
    from ..planning.fits import APART, MACHINES, best_fit, usable

    name, files = family.reference_model.name, " and ".join(family.reference_model.fp8_files)
    found = []
    for fp8, title in ((False, f"{name} in bf16"), (True, f"{name} as {files}")):
        if fp8 and not files:
            continue
        if gpus:
            fit = best_fit(family, len(gpus), min(gpu.total for gpu in gpus), fp8)
            how = f"fits all {len(gpus)} GPU(s) as {fit}" if fit.layout else f"does not fit {len(gpus)} GPU(s)"
            apart = f" ({APART})" if fit.apart else ""
            found.append(Finding("ok" if fit.layout else "warn", f"{title} {how}{apart}"))
        else:
            fits = [(f"{n} x {size} GB", best_fit(family, n, usable(size), fp8)) for n, size in MACHINES if n == 2]
            apart = f" ({APART})" if any(fit.apart for _, fit in fits) else ""
            found.append(Finding("ok", f"{title}: {', '.join(f'{gpus}: {fit}' for gpus, fit in fits)}{apart}"))
    return found


def check_quantized() -> Finding:
    """Whether files in ComfyUI's quantized formats are read here."""
    from ..parallel.formats import FORMATS
    from ..parallel.kitchen import REMEDY, has_kitchen

    titles = ", ".join(form.title for form in FORMATS.values())
    if has_kitchen():
        return Finding("ok", f"files in {titles} are read, with comfy-kitchen")
    return Finding("warn", f"files in {titles} are not read: comfy-kitchen is not installed", REMEDY)


def choose(family: Family, machine: Machine, gpus: list[Gpu]) -> Choice | None:
    """What **Parallel Layout** would choose for the family's reference model on these GPUs; None if nothing fits."""
    from ..planning.auto_layout import choose_for_reference

    try:
        return choose_for_reference(machine, [gpu.index for gpu in gpus], family)
    except ValueError:  # which `check_memory` has said
        return None


def _option(option: Option) -> dict[str, Any]:
    return {
        "layout": option.layout.name,
        "step_ms": option.cost.ms,
        "compute_ms": option.cost.compute_ms,
        **asdict(option.cost.exchange),
        "gib": option.need / GIB,
        "fits": option.fits,
    }


COMPANIONS = ("torchvision", "torchaudio")
"""Built for one version and one kind (CPU, CUDA) of torch; transformers imports what is there of them."""


def check_companions() -> Finding | None:
    """A library beside torch that is installed and cannot be imported, on which transformers would stumble."""
    for name in COMPANIONS:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            versions = [metadata.version(package) for package in (name, "torch")]
            text = f"{name} {versions[0]} does not work with torch {versions[1]}: {_short(error)}"
            remedy = f"install the {name} that was made for this torch, from the same index, or uninstall it"
            return Finding("FAIL", text, f"{remedy}: python -m pip uninstall {name}")
    return None


def not_imported(error: Exception) -> Finding:
    """What an old or broken diffusers or transformers raises when it is imported."""
    remedy = f"see which packages do not fit together: {sys.executable} -m pip check"
    return Finding("FAIL", f"the models cannot be imported: {_short(error)}", remedy)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _hidden_gpus(machine: Machine) -> Finding:
    text = f"nvidia-smi sees {machine.driver_gpus} GPU(s), torch sees none"
    if "CUDA_VISIBLE_DEVICES" in machine.environment:
        return Finding("warn", text, "unset CUDA_VISIBLE_DEVICES, or list the GPUs in it")
    if machine.cuda is None:
        return Finding("warn", text, "install a CUDA build of torch: https://pytorch.org/get-started")
    return Finding("warn", text, f"update the NVIDIA driver to one for CUDA {machine.cuda}")


# The report.


def render(
    machine: Machine,
    findings: list[Finding],
    rows: list[LayoutFit],
    layout: ParallelismConfig | None,
    model: str,
    choice: Choice | None = None,
) -> str:
    """The report as plain text, one section after the other; ``model`` says what ``rows`` speak of."""
    lines = ["Software"]
    software = {"system": machine.system, "python": machine.python, "hybrid-dit": __version__}
    software |= {name: version or "missing" for name, version in machine.versions.items()}
    software |= {"CUDA": machine.cuda or "not in this torch", "NCCL": machine.nccl or "no"}
    software |= {"gloo": _yes(machine.gloo), "memfd_create": _yes(machine.memfd)}
    lines += [f"  {name:13}{value}" for name, value in software.items()]
    lines += ["Machine", f"  {'CPU cores':13}{machine.cores}"]
    lines.append(f"  {'memory':13}{_gib(machine.memory_available)} available of {_gib(machine.memory_total)}")
    lines.append(f"  {'/dev/shm':13}{_gib(machine.shm_free)} free of {_gib(machine.shm_total)}")
    lines += [f"  GPU {gpu.index:<9}{gpu.name}, {_gib(gpu.free)} free of {_gib(gpu.total)}" for gpu in machine.gpus]
    lines += [] if machine.gpus else [f"  {'GPU':13}none"]
    lines += [f"  {f'GPU {link.first} - {link.second}':13}{_link(link)}" for link in machine.links]
    lines += ["Environment"] if machine.environment else []
    lines += [f"  {name}={value}" for name, value in machine.environment.items()]
    if rows:
        lines.append(f"{model}: GiB per GPU (weights exact; activations and runtime estimated)")
        lines.append(f"  {'layout':16}{'GPUs':>4}   DiT   text   VAE  act.   run  total  fits")
    for row in rows:
        sizes = (row.transformer, row.text_encoder, row.vae, row.activations, row.runtime, row.total)
        line = f"  {row.name:16}{row.ranks:4}{{:6.1f}}{{:7.1f}}{{:6.1f}}{{:6.1f}}{{:6.1f}}{{:7.1f}}"
        lines.append(f"{line.format(*sizes)}  {row.fits or 'no GPUs'}")
    if choice is not None:
        lines.append(f"{model}: a step on all of these GPUs (estimated; auto takes *)")
        lines += [f"  {line}" for line in choice.table().splitlines()]
    lines.append("Checks")
    for finding in findings:
        lines.append(f"  {finding.level:5}{finding.text}")
        lines += [f"       -> {finding.remedy}"] if finding.remedy else []
    failed = any(finding.level == "FAIL" for finding in findings)
    what = f"{layout.name} ({layout.describe()})" if layout else "this machine"
    lines.append(f"{'FAIL' if failed else 'ok'}: {what} {'cannot' if failed else 'can'} run")
    return "\n".join(lines)


def _link(link: Link) -> str:
    kind = ""
    if link.kind:
        kind = ("NVLink " if link.kind.startswith("NV") else "PCIe ") + f"({link.kind}), "
    return f"{kind}peer access: {_yes(link.peer_access)}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
