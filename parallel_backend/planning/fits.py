"""Which layout of so many GPUs of a size holds a family's reference model, in bfloat16 and as ComfyUI's fp8 files."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ParallelismConfig
from ..families import FAMILIES, Family
from .auto_layout import all_layouts
from .memory import GIB, can_split, reference_memory, reference_step_bytes

MACHINES = ((2, 24), (2, 32), (2, 48), (2, 80), (4, 24), (8, 24))
"""GPUs, and the GB that they are sold with."""
APART = "*: the text encoder in host memory during steps, where it moves by itself; set the degrees by hand"
COMFYUI_BYTES = GIB
"""Of ComfyUI's own process, which has the VAE where a model comes as files: before it decodes, it has the workers move
to host memory what is in its way."""
USABLE = 0.95
"""Share of a GPU's GiB that is left by driver and error correction."""


@dataclass(frozen=True)
class Fit:
    """What fits some GPUs.

    Args:
        layout: the name of the one with the least TP, then the least Ring; empty if none fits.
        apart: whether it does only while the text encoder is in host memory, where it moves by itself.
    """

    layout: str = ""
    apart: bool = False

    def __str__(self) -> str:
        return f"{self.layout or 'no'}{' *' if self.apart else ''}"


def best_fit(family: Family, count: int, memory: float, fp8: bool) -> Fit:
    """What one would take of so many GPUs with so many bytes each, for the family's `ReferenceModel.sample`."""
    layouts = [layout for layout in all_layouts(count) if can_split(family, layout)]
    layouts.sort(key=lambda layout: (layout.tp_size, layout.ring_size))
    for apart in (False, True):
        for layout in layouts:
            if max(_turns(family, layout, fp8, apart)) <= memory:
                return Fit(layout.name, apart)
    return Fit()


def _turns(family: Family, layout: ParallelismConfig, fp8: bool, apart: bool) -> tuple[float, ...]:
    """Bytes at the peaks of what takes turns on rank 0's GPU."""
    need = reference_memory(family, layout, fp8)
    transformers, text = need.weights.transformer + need.others, need.weights.text_encoder
    held = transformers + need.runtime
    if fp8:
        step = reference_step_bytes(family, layout)
        held += COMFYUI_BYTES
    else:
        step = need.activations
        held += need.weights.vae
    return (held + step, held - transformers + text) if apart else (held + text + step,)


def usable(size: int) -> float:
    """Bytes of a GPU that is sold with so many GB."""
    return size * USABLE * GIB


def fits_table() -> str:
    """All families and formats on all `MACHINES`, in Markdown."""
    rows = [["", *(f"{count} x {size} GB" for count, size in MACHINES)], ["---"] * (len(MACHINES) + 1)]
    for family in FAMILIES:
        for fp8 in (False, True)[: 1 + bool(family.reference_model.fp8_files)]:
            fits = [best_fit(family, count, usable(size), fp8) for count, size in MACHINES]
            rows.append([f"{family.reference_model.name}, {'fp8 files' if fp8 else 'bf16'}", *map(str, fits)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
