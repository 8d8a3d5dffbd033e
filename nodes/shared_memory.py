"""GPU memory that the workers share with ComfyUI: what it gets when it asks, and what is asked of it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import torch

from ..parallel_backend.loading.checkpoint import open_checkpoint
from ..parallel_backend.planning.memory import GIB
from ..parallel_backend.planning.others_needs import OthersNeeds
from ..parallel_backend.planning.visible_gpus import gpu_names
from ..parallel_backend.runtime.client.groups import find_group, find_model
from ..parallel_backend.runtime.errors import RequestFailedError, WorkersFailedError

if TYPE_CHECKING:
    from ..parallel_backend.runtime.group_config import ModelConfig

log = logging.getLogger(__name__)

ANY_REQUEST = 2**50
"""Bytes that ComfyUI takes a model to have on its device, so that it says how many of them it wants: it gives no number
to one that has less. It asks for more than this where everything is to leave, whatever for."""

_lock = threading.Lock()
_needs: dict[str, OthersNeeds] = {}
"""Of each GPU, by its name."""


def name_of(device: torch.device) -> str:
    """What the driver calls a device of this process, as `Devices.visible` has it; empty for the CPU."""
    if device.type != "cuda":
        return ""
    names = gpu_names(torch.cuda.device_count())
    index = device.index or 0
    return names[index] if index < len(names) else ""


def is_there(config: ModelConfig, device: torch.device) -> bool:
    """Whether a model is loaded, and ComfyUI has it on a GPU."""
    return device.type == "cuda" and find_model(config) is not None


def lend(config: ModelConfig, device: torch.device, asked: int) -> int:
    """Have the workers of a model give ComfyUI so many bytes of a device, or fewer where it is known to need fewer.

    Returns:
        Bytes that ComfyUI may count on: as many as it asked for where nothing is left there that could leave.
    """
    group, name = find_group(config.group), name_of(device)
    if group is None or name not in config.devices.visible:
        return asked
    free = int(comfy.model_management.get_free_memory(device))
    needs = _needs_of(name, device)
    wanted = needs.to_give(asked, free)
    freed = left = 0
    try:
        if wanted:
            freed, left = group.lend(wanted, name)
    except (WorkersFailedError, RequestFailedError, ValueError) as error:
        # ComfyUI's own thread asks for this, and must not end by it.
        log.warning("asked for %.1f GiB of GPU %s: %s", asked / GIB, name, error)
        return 0
    needs.given(asked + free, freed, free + freed)
    if freed:
        log.info("ComfyUI has %.1f GiB of GPU %s from the workers, of %.1f asked for", freed / GIB, name, asked / GIB)
    return asked if freed >= wanted or not left else freed


def take_back(config: ModelConfig, component: str = "") -> None:
    """Have ComfyUI make room for what the workers are about to bring onto its devices; nothing where nothing comes.

    Args:
        config: of the model.
        component: that is about to be used, beside whatever else takes part; none: the model is about to be loaded, and
            nothing that ComfyUI holds is in use.
    """
    model = find_model(config)
    if config.devices.kind != "cuda" or not (_needs or model is None or component in model.lent):
        return
    names = gpu_names(torch.cuda.device_count())
    devices = {name: torch.device("cuda", names.index(name)) for name in config.devices.visible if name in names}
    if any([_needs[name].finish() for name in devices if name in _needs]):
        comfy.model_management.soft_empty_cache()  # which it does by itself, but not with --highvram
    size = 0 if model is None else model.lent.get(component, 0)
    if model is not None and not size:
        return
    for device in devices.values():
        theirs = [m for m in comfy.model_management.current_loaded_models if m.device == device and m.model is not None]
        stay = [m for m in theirs if (m.currently_used and component) or hasattr(m.model.model, "remote_part")]
        if len(stay) < len(theirs):
            size = size or bytes_to_load(config)
            reserve = comfy.model_management.extra_reserved_memory()
            comfy.model_management.free_memory(size + reserve, device, keep_loaded=stay)


def bytes_to_load(config: ModelConfig) -> int:
    """Bytes of weights that a rank of a model takes on its device once it is loaded."""
    from ..parallel_backend.planning.auto_layout import checkpoint_memory  # with the compiler: a second

    source = open_checkpoint(Path(config.path), config.part)
    weights = checkpoint_memory(source, config.layout, getattr(torch, config.dtype), config.fp8).weights
    return sum(getattr(weights, component) for component in source.components if hasattr(weights, component))


def _needs_of(name: str, device: torch.device) -> OthersNeeds:
    with _lock:
        if name not in _needs:
            _needs[name] = OthersNeeds(lambda: torch.cuda.mem_get_info(device)[0])
        return _needs[name]
