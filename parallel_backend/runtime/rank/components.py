"""Which components a model may have, by the names that checkpoints give them."""

from __future__ import annotations

from .component import Component
from .text_component import TextEncoderComponent, VisionComponent
from .transformer_component import TransformerComponent
from .vae_component import VAEComponent

COMPONENTS: dict[str, type[Component]] = {
    part.name: part for part in (TransformerComponent, TextEncoderComponent, VisionComponent, VAEComponent)
}
