"""Out of memory: what a rank can say of it, and what its user can do about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ...config import ParallelismConfig
from ...loading.checkpoint import Checkpoint
from ...loading.text_encoder_file import TextEncoderFile
from ...loading.vae_file import VaeFile
from ...planning.memory import GIB, transformer_bytes
from ..group_config import ModelConfig

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = r"([\d.]+) (bytes|KiB|MiB|GiB)"
_ASKED = re.compile(rf"tried to allocate {_SIZE}", re.IGNORECASE)
_FREE = re.compile(rf"of which {_SIZE} is free")
_KINDS = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def out_of_memory(error: BaseException, available: Callable[[], int]) -> tuple[int, int] | None:
    """Bytes asked for (0: not known) and bytes free, where an error of torch or Python says that memory ran out.

    Args:
        error: what was raised.
        available: bytes free now, where the error does not say how many there were.
    """
    text = str(error)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not _KINDS.search(text):
        return None
    asked, free = _ASKED.search(text), _FREE.search(text)
    return _bytes(asked) if asked else 0, _bytes(free) if free else available()


def _bytes(match: re.Match[str]) -> int:
    return round(float(match.group(1)) * _UNITS[match.group(2)])


def advice(config: ModelConfig, source: Checkpoint, component: str) -> str:
    """What to do where a component ran out of memory, with numbers where they are known.

    Args:
        config, source: of the model.
        component: that was at work.
    """
    remedies = []
    if component == "vae":
        remedies.append("draw a smaller picture or a smaller batch, or decode in tiles (VAE Decode (Tiled))")
    elif component == "text_encoder":
        remedies.append("shorten the prompt, or spread the text encoder over more devices")
    else:
        remedies.append("draw a smaller picture or a smaller batch")
        if not isinstance(source, TextEncoderFile | VaeFile):
            remedies += _layouts(config, source)
    if config.encoder_memory != "host" and component != "text_encoder":
        remedies.append("set the loader's encoder_memory to 'host'")
    return "What would help: " + "; or ".join(remedies)


def _layouts(config: ModelConfig, source: Checkpoint) -> list[str]:
    """Layouts of as many ranks, and of twice as many, whose ranks hold less of the transformer."""
    assert not isinstance(source, TextEncoderFile | VaeFile)
    family, current = source.family, config.layout
    size = getattr(torch, config.dtype).itemsize

    def held(layout: ParallelismConfig) -> str:
        return f"{transformer_bytes(family, source.transformer_config, layout, size) / GIB:.1f} GiB"

    found: list[ParallelismConfig] = []
    for tp in (current.tp_size * 2, current.tp_size * 4, current.tp_size * 8):
        for ranks in (current.world_size, current.world_size * 2):
            layout = replace(current, ulysses_size=max(1, ranks // tp), ring_size=1, tp_size=tp)
            if layout.world_size != ranks:
                continue
            try:
                source.check(layout)
            except ValueError:  # its heads cannot be split so
                continue
            found.append(layout)
    found.sort(key=lambda layout: (layout.world_size, layout.tp_size))
    return [
        f"take {layout.name} on {layout.world_size} devices, where a rank holds {held(layout)} of the transformer's "
        f"weights instead of {held(current)}"
        for layout in found[:2]
    ]
