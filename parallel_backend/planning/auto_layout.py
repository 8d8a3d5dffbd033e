"""The choice of a layout: what each one of so many GPUs would take and need, and the fastest that fits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..config import ParallelismConfig
from ..families import Family
from ..loading.checkpoint import Checkpoint
from ..loading.model_folders import model_name
from ..loading.quantized_weight import column_unit
from ..loading.vae_file import VaeFile
from ..loading.weight_loader import shard_bytes
from ..machine import Machine, collect
from ..mesh import Axis
from ..parallel.tensor import apply_tensor_parallel, coarser, whole_blocks
from ..parallelize import shard_text_model
from .cost_model import StepCost, Workload, step_cost
from .devices import gpu_numbers, resolve_devices
from .fewer_gpus import fastest
from .gpu_speed import axis_links, slowest
from .lost_gpus import left_out, working_gpus
from .memory import (
    GIB,
    MemoryEstimate,
    WeightBytes,
    reference_config,
    reference_memory,
    step_activation_bytes,
    weight_bytes,
)
from .visible_gpus import gpu_names, hidden_gpus, of_one_kind, words
from .workload import sample_workload


@dataclass(frozen=True)
class Option:
    """A layout that the model can be split by.

    Args:
        layout: its degrees.
        cost: of a step.
        need: bytes on rank 0.
        fits: whether every GPU has as much.
    """

    layout: ParallelismConfig
    cost: StepCost
    need: int
    fits: bool


@dataclass(frozen=True)
class Choice:
    """What was chosen, among what (fastest first), and what one should know of the estimate.

    ``copies``: all of the GPUs reach each other's memory, so that copy engines can exchange. ``devices``: those of
    the GPUs that it is for, as `resolve_devices` takes them; empty where it is for all that were asked for.
    """

    layout: ParallelismConfig
    options: tuple[Option, ...]
    reason: str
    copies: bool = False
    devices: str = ""

    @property
    def ms(self) -> float:
        """What a step is predicted to take."""
        return next((option.cost.ms for option in self.options if option.layout == self.layout), 0.0)

    def table(self) -> str:
        """A line for each option."""
        lines = [f"{'layout':16}   step ms = compute + exchange (of it hidden)   GiB per GPU"]
        for option in self.options:
            exchange, mark = option.cost.exchange, "*" if option.layout == self.layout else " "
            lines.append(
                f"{option.layout.name:16}{mark}{option.cost.ms:10.0f} {option.cost.compute_ms:9.0f} "
                f"{exchange.total_ms:10.0f} ({exchange.total_ms - exchange.exposed_ms:.0f})".ljust(64)
                + f"{option.need / GIB:6.1f}{'' if option.fits else ' does not fit'}"
            )
        return "\n".join(lines)


def all_layouts(ranks: int) -> list[ParallelismConfig]:
    """Every layout of so many ranks."""
    divisors = [degree for degree in range(1, ranks + 1) if ranks % degree == 0]
    return [
        ParallelismConfig(ulysses, ring, ranks // (ulysses * ring))
        for ulysses in divisors
        for ring in divisors
        if ranks % (ulysses * ring) == 0
    ]


def choose_layout(
    machine: Machine,
    gpus: Sequence[int],
    free: Sequence[int],
    work: Workload,
    need: Callable[[ParallelismConfig], MemoryEstimate],
    model: str,
    sample: str = "1024 x 1024",
) -> Choice:
    """The fastest layout over all of some GPUs that fits them.

    Args:
        machine: where they are.
        gpus: their numbers, in rank order.
        free: bytes that the model may take of each.
        work: of a step.
        need: what a layout needs on rank 0; ValueError where the model cannot be split so.
        model: what it is called.
        sample: what the step is of.

    Raises:
        ValueError: none fits; says which is the nearest.
    """
    device, unknown = slowest([machine.gpus[gpu] for gpu in gpus])
    options = []
    for layout in all_layouts(len(gpus)):
        try:
            total = need(layout).total
        except ValueError:
            continue
        cost = step_cost(work, layout, axis_links(machine, gpus, layout), device)
        options.append(Option(layout, cost, total, total <= min(free)))
    options.sort(key=lambda option: option.cost.ms)
    fitting = [option for option in options if option.fits]
    if not fitting:
        least = min(options, key=lambda option: option.need)
        raise ValueError(
            f"no layout of {model} fits {len(gpus)} GPU(s): {least.layout.name} needs least, {least.need / GIB:.1f} "
            f"GiB each, and {min(free) / GIB:.1f} are free; free memory, name more GPUs, or load fp8 weights"
        )
    best = fitting[0]
    words = f"{best.layout.name} of {len(gpus)} GPU(s): about {_time(best.cost.ms)} a step at {sample}"
    if len(fitting) > 1:
        second = fitting[1]
        words += f", next {second.layout.name} {_time(second.cost.ms)}"
    faster = [option.layout.name for option in options if option.cost.ms < best.cost.ms]
    words += f"; faster, but too large: {', '.join(faster)}" if faster else ""
    words += f"; {', '.join(unknown)} is taken as fast as an H200" if unknown else ""
    reached = [link.peer_access for link in machine.links if {link.first, link.second} <= set(gpus)]
    return Choice(best.layout, tuple(options), words, len(gpus) > 1 and all(reached))


def _time(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 100 else f"{ms:.1f} ms"


def choose_for_reference(machine: Machine, gpus: Sequence[int], family: Family) -> Choice:
    """The choice for a family's reference model in bfloat16, with what is free now."""
    work = sample_workload(family, reference_config(family))
    reference = family.reference_model

    @cache
    def need(layout: ParallelismConfig) -> MemoryEstimate:
        return reference_memory(family, layout)

    def choose(some: Sequence[int]) -> Choice:
        free = [machine.gpus[gpu].free for gpu in some]
        return choose_layout(machine, some, free, work, need, reference.name, reference.sample)

    return choose_fastest(machine, gpus, choose)


def choose_fastest(machine: Machine, gpus: Sequence[int], choose: Callable[[Sequence[int]], Choice]) -> Choice:
    """The choice for all of some GPUs, or for fewer where these are predicted to be faster, or alone have room.

    Args:
        machine: where they are.
        gpus: their numbers.
        choose: for some of them; ValueError where nothing fits.

    Raises:
        ValueError: nothing fits.
    """
    some, choice, everything = fastest(machine, gpus, choose, lambda choice: choice.ms)
    if len(some) == len(gpus):
        return choice
    why = "all of them have no room for it"
    if everything is not None:
        why = f"{everything.layout.name} of all {len(gpus)} would take {_time(everything.ms)}"
    listed = ", ".join(map(str, some))
    return replace(choice, reason=f"{choice.reason}, on GPU {listed}: {why}", devices=",".join(map(str, some)))


def choose_for_checkpoint(source: Checkpoint, devices: str, dtype: str, fp8: str) -> Choice:
    """The choice for a checkpoint on this machine; the same one is made again as long as this process lives.

    Args:
        source: what is to be loaded; what it does not hold (a text encoder, a transformer) is counted as that of the
            family's reference model. A VAE alone gets all GPUs: it is small, and joins the workers of the others there.
        devices: see `resolve_devices`; ``auto`` is all GPUs of one kind, or else of all kinds, or fewer of them where
            these are predicted to be faster. Named ones are all taken; the choice says where fewer would be faster.
        dtype, fp8: of the weights, as `ModelConfig.create` has them.

    Raises:
        ValueError: none fits.
    """
    numbers = gpu_numbers(devices)
    if numbers is not None and not numbers:
        return Choice(ParallelismConfig(), (), "single: on the CPU, where a step takes as long on any layout")
    machine = collect()
    gpus = tuple(working_gpus(len(machine.gpus)) if numbers is None else numbers)
    if not gpus:
        here = len(machine.gpus)
        return Choice(ParallelismConfig(), (), f"single: there is no GPU here{hidden_gpus(here)}{left_out(here)}")
    if isinstance(source, VaeFile):
        return _all_of(gpus) if numbers is not None else choose_kind(machine, gpus, _all_of)
    weights = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    key = (str(source.path), source.fingerprint(), gpus, weights, fp8)
    with _lock:
        for gpu in gpus:
            _free[gpu] = max(_free.get(gpu, 0), machine.gpus[gpu].free)
        if key not in _choices:
            choose = _chooser(machine, source, weights, fp8)
            if numbers is None:
                choice = choose_kind(machine, gpus, lambda kind: choose_fastest(machine, kind, choose))
                remark = f"{hidden_gpus(len(machine.gpus))}{left_out(len(machine.gpus))}"
            else:
                choice = choose(gpus)
                remark = _warning(machine, gpus, choice.ms, choose)
            _choices[key] = replace(choice, reason=f"{choice.reason}{remark}")
        return _choices[key]


def _chooser(machine: Machine, source: Checkpoint, dtype: torch.dtype, fp8: str) -> Callable[[Sequence[int]], Choice]:
    """The fastest layout of a checkpoint over all of some GPUs, with the most that was ever free of each."""
    work = sample_workload(source.family, _transformer_config(source))

    @cache
    def need(layout: ParallelismConfig) -> MemoryEstimate:
        return checkpoint_memory(source, layout, dtype, fp8)

    def choose(gpus: Sequence[int]) -> Choice:
        free, sample = [_free[gpu] for gpu in gpus], source.family.reference_model.sample
        return choose_layout(machine, gpus, free, work, need, model_name(source.path), sample)

    return choose


def warning_of(source: Checkpoint, devices: str, layout: ParallelismConfig, dtype: str, fp8: str) -> str:
    """What is to be said of a layout that was set by hand: whether fewer of its GPUs are predicted to be faster.

    Args:
        source: what is loaded.
        devices: see `resolve_devices`.
        layout: over all of them.
        dtype, fp8: see `choose_for_checkpoint`.

    Returns:
        It, with the remedy; empty where all is well.
    """
    visible = resolve_devices(devices, layout.world_size).visible
    machine = collect() if len(visible) > 1 else None
    if machine is None:
        return ""
    names = gpu_names(len(machine.gpus))
    gpus = [names.index(name) for name in visible]
    weights = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    work = sample_workload(source.family, _transformer_config(source))
    device, _ = slowest([machine.gpus[gpu] for gpu in gpus])
    ms = step_cost(work, layout, axis_links(machine, gpus, layout), device).ms
    with _lock:
        for gpu in gpus:
            _free[gpu] = max(_free.get(gpu, 0), machine.gpus[gpu].free)
        warning = _warning(machine, gpus, ms, _chooser(machine, source, weights, fp8))
    return warning and f"{layout.name}: about {_time(ms)} a step at {source.family.reference_model.sample}{warning}"


def _warning(machine: Machine, gpus: Sequence[int], ms: float, choose: Callable[[Sequence[int]], Choice]) -> str:
    """Where fewer of some GPUs are predicted to be faster than a step of so many ms on all of them: which, and how."""
    if len(gpus) < 2:
        return ""
    with contextlib.suppress(ValueError):
        some, choice, _ = fastest(machine, gpus, choose, lambda choice: choice.ms)
        if len(some) < len(gpus) and choice.ms < ms:
            return (
                f"; SLOWER than fewer GPUs: {choice.layout.name} on GPU {', '.join(map(str, some))} would take "
                f"{_time(choice.ms)}. Slow links, or one slow GPU, hold all of them up: take those, or an automatic "
                "layout with the devices 'auto'"
            )
    return ""


def _all_of(gpus: Sequence[int]) -> Choice:
    """The layout of a VAE alone, whose parts of a picture are the same in any."""
    layout = ParallelismConfig(ulysses_size=len(gpus))
    return Choice(layout, (), f"{layout.name}: a VAE takes all GPUs that there are")


def choose_kind(machine: Machine, gpus: Sequence[int], choose: Callable[[Sequence[int]], Choice]) -> Choice:
    """The choice for those of some GPUs of the kind that is fastest, or for all of them where none of the kinds has
    room. Ranks wait for each other: a slow GPU, or a small one, would be the measure of all.

    Args:
        machine: where they are.
        gpus: their numbers.
        choose: for some of them; ValueError where nothing fits.

    Raises:
        ValueError: nothing fits all of them.
    """
    kinds = [(gpu.name, round(gpu.total / GIB)) for gpu in machine.gpus]
    groups = [[gpus[place] for place in group] for group in of_one_kind([kinds[gpu] for gpu in gpus])]
    found = []
    for group in groups if len(groups) > 1 else []:
        device, unknown = slowest([machine.gpus[gpu] for gpu in group])
        with contextlib.suppress(ValueError):
            # What is not known counts as fast as the fastest.
            found.append((bool(unknown), device.compute / len(group), group, choose(group)))
    if not found:
        return choose(gpus)
    *_, group, choice = min(found, key=lambda entry: entry[:2])
    left = ", ".join(f"{kinds[gpu][0]} (GPU {gpu})" for gpu in gpus if gpu not in group)
    reason = f"{choice.reason}; {words(group, kinds)} and leaves {left}; name them in 'devices' to have them, too"
    return replace(choice, reason=reason, devices=choice.devices or ",".join(map(str, group)))


_lock = threading.Lock()
_choices: dict[Any, Choice] = {}
_free: dict[int, int] = {}
"""The most that was ever free of each GPU: what our workers hold makes room for another model when it has to."""


def checkpoint_memory(source: Checkpoint, layout: ParallelismConfig, dtype: torch.dtype, fp8: str) -> MemoryEstimate:
    """What a checkpoint needs on rank 0 for its family's sample, beside what it does not hold itself.

    Raises:
        ValueError: the model cannot be split so.
    """
    family, config = source.family, _transformer_config(source)
    text_config = getattr(source, "text_config", None) or family.reference_model.text_config
    counted = weight_bytes(family, config, text_config, layout, dtype.itemsize)
    sizes = {"transformer": counted.transformer, "text_encoder": counted.text_encoder}
    width = family.transformer.context_width
    if width(config) != width(reference_config(family)):
        sizes["text_encoder"] = 0  # a model with another text encoder (FLUX.2 klein), which the workers do not hold
    if "transformer" in source.components:
        model = family.transformer.build(config)
        unit = column_unit(source.weights("transformer").values())
        plan = coarser(model, family.transformer.plan(dict(model.config)), unit, layout.tp_size)
        table = apply_tensor_parallel(model, plan, Axis(None, layout.tp_size, 0)) or whole_blocks(model, plan)
        sizes["transformer"] = shard_bytes(model, source.weights("transformer"), table, dtype, fp8)
    if "text_encoder" in source.components:
        kind = family.needs_text_encoder()
        model = kind.build(text_config)
        table = shard_text_model(model, kind, text_config, Axis(None, kind.degree(text_config, layout.world_size), 0))
        sizes["text_encoder"] = shard_bytes(model, source.weights("text_encoder"), table, dtype, fp8)
    weights = WeightBytes(sizes["transformer"], sizes["text_encoder"], counted.vae)
    return MemoryEstimate(weights, step_activation_bytes(family, config, layout))


def _transformer_config(source: Checkpoint) -> Mapping[str, Any]:
    """The transformer's configuration, with every value; that of the reference model where the source has none."""
    config = getattr(source, "transformer_config", None)
    if config is None:
        return reference_config(source.family)
    return dict(source.family.transformer.build(config).config)
