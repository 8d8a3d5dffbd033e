"""A model of a rank: its components, what is kept for it, and its figures."""

from __future__ import annotations

import resource
import socket
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...parallel import copies
from .component import Component, ModelSettings, Place
from .transformer_component import TransformerComponent


@dataclass
class HostedModel:
    """A model of this rank: its components by name, and the conditioning that is kept for it."""

    settings: ModelSettings
    encoder_memory: str
    components: dict[str, Component] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    adapter_tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def formats(self) -> dict[str, dict[str, int]]:
        """For each component its weights' bytes by what they are held as."""
        return {kind: component.formats for kind, component in self.components.items() if component.formats}

    def stats(self) -> dict[str, object]:
        """This rank's figures, under the names that docs/report.md explains."""
        device = self.settings.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) + copies.held_bytes()
            device_name = torch.cuda.get_device_name(device)
        else:
            peak, device_name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "cpu"
        held = {kind: component for kind, component in self.components.items() if component.nbytes}
        transformer = self.components.get("transformer")
        return {
            "host": socket.gethostname(),
            "device": str(device),
            "device_name": device_name,
            "weight_bytes": {kind: component.nbytes for kind, component in held.items()},
            "weight_formats": self.formats(),
            "places": {kind: component.place.value for kind, component in held.items()},
            "peak_bytes": peak,
            "cache_bytes": transformer.cache.kept_bytes()
            if isinstance(transformer, TransformerComponent) and transformer.place is not Place.FILE
            else 0,
        }
