"""The VAE of a model, which rank 0 holds whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...families import Model
from ...loading.pipeline_folder import PipelineFolder
from ...loading.vae_file import VaeFile
from ...mesh import raise_together
from ...parallel.tensor import ParamShard
from ...planning.memory import vae_activation_bytes
from .component import Component, Place


class VAEComponent(Component):
    """The VAE: whole on rank 0, in fp32; the other ranks have nothing of it."""

    name = "vae"

    @property
    def _here(self) -> bool:
        return self.settings.mesh.world.rank == 0

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        if not self._here:
            return torch.nn.Module(), {}
        assert isinstance(self.settings.source, PipelineFolder | VaeFile)
        module = self.settings.family.needs_vae().build(self.settings.source.vae_config)
        self._config = dict(module.config)
        return module, {}

    def _count(self, module: Model, table: Mapping[str, ParamShard]) -> int:
        return sum(p.numel() for p in module.parameters()) * torch.float32.itemsize

    def load(self, on_bytes: Callable[[int], None]) -> None:
        settings = self.settings
        self._built = None
        error: Exception | None = None
        if self._here:
            source = settings.source
            place = source.path if isinstance(source, VaeFile) else source.path / self.name
            try:
                vae = source.load() if isinstance(source, VaeFile) else settings.family.needs_vae().load(place)
                self.module = vae.to(settings.device)
                for name, tensor in self.module.state_dict().items():
                    if not tensor.isfinite().all():
                        raise ValueError(f"{name} holds values that are not finite numbers; download it again")
            except (OSError, ValueError) as found:
                self.module = None
                error = ValueError(f"the VAE in {place} cannot be loaded: {found}")
            except Exception as found:  # such as too little memory
                self.module, error = None, found
        raise_together(error, settings.mesh.world)
        on_bytes(self.nbytes)
        self.place = Place.DEVICE

    def decode(self, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` in -1..1 from a latent; on rank 0."""
        return self.settings.family.needs_vae().decode(self.module, latent.to(self.settings.device, torch.float32))

    def encode(self, image: Tensor) -> Tensor:
        """Latent ``[B, C, h, w]`` from an image ``[B, 3, H, W]`` in -1..1; on rank 0."""
        return self.settings.family.needs_vae().encode(self.module, image.to(self.settings.device, torch.float32))

    def workspace(self, pixels: int) -> int:
        """About the bytes that so many pixels take beside the weights; on rank 0."""
        if not self._here:
            return 0
        return vae_activation_bytes(self.settings.family, self._config, pixels)
