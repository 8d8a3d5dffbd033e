"""The VAE of a model: whole on rank 0, or on all ranks, which then work on each picture together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ...families import Model
from ...families.vae import OutOfStepError, VaeRun
from ...loading.pipeline_folder import PipelineFolder
from ...loading.vae_file import VaeFile
from ...mesh import raise_together
from ...parallel.tensor import ParamShard
from ...planning.memory import vae_activation_bytes
from .component import Component, Place


@dataclass(frozen=True)
class Piece:
    """Which part of a clip is at work.

    Args:
        run: name of the clip's way through.
        is_first, is_last: whether nothing of it came before, or comes after.
    """

    run: str = ""
    is_first: bool = True
    is_last: bool = True


WHOLE = Piece()


class VAEComponent(Component):
    """The VAE, in fp32: whole on rank 0, of which the others have nothing, or on each rank (`VAE.over_ranks`)."""

    name = "vae"
    agreed = False
    """Whether all ranks know of the last failure of `together`: none waits for another."""
    _run: tuple[str, VaeRun] | None = None
    """The clip that is on its way, by the name of its run."""

    @property
    def over_ranks(self) -> bool:
        """Whether all ranks work on a picture."""
        return self.settings.family.needs_vae().over_ranks

    @property
    def _here(self) -> bool:
        return self.over_ranks or self.settings.mesh.world.rank == 0

    @property
    def _config(self) -> Mapping[str, object]:
        assert isinstance(self.settings.source, PipelineFolder | VaeFile)
        return self.settings.source.vae_config

    def build(self) -> tuple[Model, Mapping[str, ParamShard]]:
        if not self._here:
            return torch.nn.Module(), {}
        return self.settings.family.needs_vae().build(self._config), {}

    def _count(self, module: Model, table: Mapping[str, ParamShard]) -> int:
        return sum(p.numel() for p in module.parameters()) * torch.float32.itemsize

    def load(self, on_bytes: Callable[[int], None]) -> None:
        settings = self.settings
        self._built = None
        error: Exception | None = None
        if self._here:
            source = settings.source
            assert isinstance(source, PipelineFolder | VaeFile)
            is_file = isinstance(source, VaeFile)
            place = source.path if is_file else source.path / self.name
            try:
                kind = settings.family.needs_vae()
                vae = source.load() if isinstance(source, VaeFile) else kind.load(place, source.vae_config)
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

    def drop(self) -> None:
        self._run = None
        super().drop()

    def pixels(self, x: Tensor, decodes: bool, piece: Piece) -> int:
        """Of all pictures of a piece."""
        if not decodes:
            return x[:, 0].numel()
        shape = self.settings.family.needs_vae().latent_shape(self._config)
        frames = 1
        if shape.frames:
            frames = shape.pictures(x.shape[2]) if piece.is_first else shape.frames * x.shape[2]
        return x.shape[0] * frames * x.shape[-2] * x.shape[-1] * shape.downscale**2

    def decode(self, latent: Tensor) -> Tensor:
        """Image ``[B, 3, H, W]`` in -1..1 from a latent; what rank 0 does alone."""
        return self.settings.family.needs_vae().decode(self.module, latent.to(self.settings.device, torch.float32))

    def encode(self, image: Tensor) -> Tensor:
        """Latent ``[B, C, h, w]`` from an image ``[B, 3, H, W]`` in -1..1; what rank 0 does alone."""
        return self.settings.family.needs_vae().encode(self.module, image.to(self.settings.device, torch.float32))

    def together(self, x: Tensor, decodes: bool, piece: Piece) -> Tensor:
        """The next pictures of a run from its next latent frames, or the way back. Collective; on every rank the same.

        Args:
            x: latents ``[B, C, F, h, w]`` or pictures ``[B, 3, F, H, W]``; as many frames as the VAE takes at a time.
            decodes: which of them.
            piece: the first one of a run begins anew, and the run before is forgotten.

        Raises:
            Exception: on every rank, where one of them failed; `agreed` says whether all know of it.
        """
        world, kind = self.settings.mesh.world, self.settings.family.needs_vae()
        self.agreed = False
        error: Exception | None = None
        done = x
        try:
            if piece.is_first:
                self._run = piece.run, kind.start(self.module, self._config, decodes, world, x.shape)
            elif self._run is None or self._run[0] != piece.run:
                raise RuntimeError(f"what the {self.label} kept of the frames before is gone; run the graph again")
            done = self._run[1].piece(x)
        except OutOfStepError:
            self._run = None
            raise
        except Exception as found:
            error = found
        if error is not None or piece.is_last:
            self._run = None
        if world.is_split:
            failed = torch.tensor(int(error is not None), device=self.settings.device)
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=world.group)
            self.agreed = True
            if not failed:
                return done
            self._run = None
        self.agreed = True
        raise_together(error, world)
        return done

    def forget(self, run: str) -> None:
        """Free what is kept of a run; nothing where another one is on its way."""
        if self._run is not None and self._run[0] == run:
            self._run = None

    def workspace(self, pixels: int) -> int:
        """About the bytes that so many pixels take beside the weights on this rank."""
        if not self._here:
            return 0
        return vae_activation_bytes(self.settings.family, self._config, pixels, self.settings.mesh.world.degree)
