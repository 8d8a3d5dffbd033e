"""The models of a group as one rank holds them, and what they can do: encode text, predict, decode, encode images."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...cache.config import CacheSettings
from ...cache.decision import NO_ROOM, Decision, Evaluation
from ...config import AS_IT_IS, ParallelismConfig, Speed
from ...families import Conditioning, VisionImage
from ...loading.adapters import from_description, unpacked
from ...loading.checkpoint import Checkpoint
from ...loading.content import open_same_checkpoint
from ...mesh import SINGLE, Axis, raise_together
from ...planning.memory import GIB
from ..errors import BatchTooLargeError
from .adaptable_component import AdaptableComponent
from .byte_counter import ByteCounter, OnProgress
from .component import Component, ModelSettings, Place
from .components import COMPONENTS
from .eviction import Eviction
from .hosted_model import HostedModel
from .mesh_check import MeshCheck
from .meshes import Meshes
from .residents import Residents
from .text_component import TextEncoderComponent, VisionComponent
from .transformer_component import TransformerComponent
from .vae_component import WHOLE, Piece, VAEComponent

LOADING_BYTES = GIB
"""Device memory that loading takes beside the weights."""
ENCODER_RESERVE = 6 * GIB
"""What has to stay free on each GPU for a text encoder to stay there under ``auto``: a step's activations, and what
ComfyUI does on the first GPU (its VAE takes 4.9 GiB for 1024 x 1024 in fp32)."""


class Engine:
    """One rank's shards of all models of a group. Every rank is asked for the same things in the same order.

    Args:
        device: of this rank.
        notify: told what users should find in the log.
        eviction: for tests, one with another view of the memory that there is.
        on_progress: told of the reading of parts that come back.
        check: of meshes that are built, whether their ranks reach each other.
    """

    def __init__(
        self,
        device: torch.device,
        notify: Callable[[str], None] = print,
        eviction: Eviction | None = None,
        on_progress: OnProgress = lambda *_: None,
        check: MeshCheck | None = None,
    ) -> None:
        self.device = device
        self.check = check or MeshCheck(device, 0.0, lambda _: None)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        world = Axis(dist.group.WORLD, ranks, self.rank) if ranks > 1 else SINGLE
        self.eviction = eviction or Eviction(device, world, notify)
        self.residents = Residents(self.eviction, on_progress)
        self.models: dict[str, HostedModel] = {}
        self.meshes = Meshes(device, self.check, self.eviction.notify)
        self.alone = False
        """Whether what this rank is doing concerns no other: none waits for it, nothing changes that all have alike."""
        self._told_of = ""
        """The last run for whose residuals there was no room."""

    @torch.no_grad()
    def load(
        self,
        name: str,
        path: str,
        layout: ParallelismConfig,
        dtype: torch.dtype,
        on_progress: OnProgress,
        fp8: str = "cast",
        encoder_memory: str = "auto",
        orphans: Sequence[str] = (),
        content: str = "",
        speed: Speed = AS_IT_IS,
        file_part: str = "",
    ) -> None:
        """Read this rank's shards of a checkpoint; nothing where the model is there already.

        Args:
            name: what the model is called from now on.
            path: a diffusers pipeline folder, or a model in one file.
            layout: degrees; their product is the world size.
            dtype: of the transformer and the text encoder; the VAE stays in fp32.
            on_progress: told a few times a second at most.
            fp8, encoder_memory: see `ModelConfig`.
            orphans: models that nobody refers to any more.
            content: the `content_digest` that the checkpoint must have, where there are several hosts.
            speed: how the transformer's blocks run.
            file_part: the part of `open_checkpoint`.

        Raises:
            ValueError: the checkpoint is damaged or does not fit. Nothing of it stays, the other models do.
        """
        self.residents.orphans = set(orphans) - {name}
        for orphan in self.residents.orphans & self.models.keys():
            for part in self.models[orphan].components.values():
                if part.place is Place.HOST:
                    part.drop()  # on a device it may wait until that room is needed, but host memory is scarce
        if name in self.models:
            return
        model = self._build(path, layout, dtype, fp8, encoder_memory, content, speed, file_part)
        count = ByteCounter(sum(p.nbytes for p in model.components.values() if not p.on_demand), on_progress)
        self.models[name] = model
        try:
            for kind, part in model.components.items():
                if part.on_demand:
                    continue
                self.residents.make_room(part, part.nbytes, LOADING_BYTES if self.device.type == "cuda" else 0)
                part.load(count.add)
                self.residents.used[name, kind] = part
        except BaseException:
            self.unload(name)
            raise
        count.finish()

    def _build(
        self,
        path: str,
        layout: ParallelismConfig,
        dtype: torch.dtype,
        fp8: str,
        encoder_memory: str,
        content: str = "",
        speed: Speed = AS_IT_IS,
        file_part: str = "",
    ) -> HostedModel:
        mesh = self.meshes.of(layout, speed.copy_engines)
        source: Checkpoint | ValueError
        try:
            source = open_same_checkpoint(Path(path), content, file_part)
        except ValueError as error:
            source = error
        raise_together(source if isinstance(source, ValueError) else None, self.eviction.axis)
        assert not isinstance(source, ValueError)
        settings = ModelSettings(source, layout, mesh, self.device, dtype, fp8, speed)
        return HostedModel(settings, encoder_memory, {part: COMPONENTS[part](settings) for part in source.components})

    def unload(self, name: str) -> None:
        """Free a model for good; nothing where there is none of that name."""
        model = self.models.pop(name, None)
        self.residents.remove(name)
        for part in () if model is None else model.components.values():
            part.drop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def offload(self, name: str, component: str) -> int:
        """Free the device memory of a component, if it has any; the next use brings it back. Collective.

        Returns:
            Bytes that the next use takes on this rank's device.
        """
        part = self._model(name).components.get(component)
        if part is None:
            return 0
        if part.place is Place.DEVICE:
            self.eviction.leave(part, "as ComfyUI asked for memory")
            self.residents.make_room_anew()
        return part.nbytes

    def lend(self, size: int, ranks: Sequence[int]) -> tuple[int, int, dict[str, dict[str, int]]]:
        """Free device memory of some ranks; see `Residents.lend`. What is to come back is by model and component."""
        freed, left, lent = self.residents.lend(size, ranks)
        found: dict[str, dict[str, int]] = {}
        for (name, component), nbytes in lent.items():
            found.setdefault(name, {})[component] = nbytes
        return freed, left, found

    def keep(self, name: str, tensors: Mapping[str, Tensor], forget: list[str]) -> None:
        """Keep conditioning of a model on the device under its name, until it is forgotten."""
        self.alone = True  # the client has no rank use what one of them could not keep
        model = self._model(name)
        for old in forget:
            model.kept.pop(old, None)
        for new, tensor in tensors.items():
            dtype = model.settings.dtype if tensor.is_floating_point() else tensor.dtype
            model.kept[new] = tensor.to(self.device, dtype)

    @torch.no_grad()
    def encode_text(self, name: str, ids: Tensor, mask: Tensor, images: Sequence[VisionImage] = ()) -> Tensor:
        """Context ``[B, L, C]`` from token ids and mask ``[B, L]``, and the images that ids refer to."""
        part = cast(TextEncoderComponent, self._part(name, "text_encoder"))
        features = self._encode_images(name, images) if images else None
        self.residents.bring(name, part, ids.numel())
        context = part.encode(ids, mask, features, [image.grid for image in images])
        memory = self._model(name).encoder_memory
        if memory == "auto" and self.device.type == "cuda" and self.eviction.least_available() < ENCODER_RESERVE:
            self.eviction.leave(part, f"since less than {ENCODER_RESERVE / GIB:.0f} GiB would stay free beside it")
        elif memory == "host" and self.eviction.fits_host(part):
            part.to_host()
        return context

    def _encode_images(self, name: str, images: Sequence[VisionImage]) -> Tensor:
        """What the text encoder reads in the images' places. The tower is on the first device while it works."""
        vision = cast(VisionComponent, self._part(name, "vision_tower"))
        self.residents.bring(name, vision, sum(len(image.patches) for image in images))
        features = vision.encode(images)
        self.eviction.leave(vision, "as the images are encoded")
        self.residents.make_room_anew()
        return features

    @torch.no_grad()
    def adapt(
        self, name: str, component: str, set_name: str, index: Tensor, data: Tensor | None, forget: Sequence[str]
    ) -> None:
        """Have a model's component be that of its file with a set of patches, and with no others; see `Adapt`."""
        part = self._part(name, component)
        if not isinstance(part, AdaptableComponent):
            raise ValueError(f"the {component.replace('_', ' ')} takes no patches of its weights")
        tensors = self._model(name).adapter_tensors.setdefault(component, {})
        description = unpacked(index, data, tensors)
        for old in forget:
            tensors.pop(old, None)
        self.residents.bring(name, part, 0)
        adapters = from_description(set_name, description, tensors)
        same = part.adapters.same_but_strengths(adapters)  # and so takes no more memory, or less
        part.adapt(adapters, lambda size: self.residents.make_room(part, size, 0))
        if not same:
            self.residents.make_room_anew()

    @torch.no_grad()
    def predict(
        self,
        name: str,
        x: Tensor,
        timestep: Tensor,
        context: str,
        references: Sequence[str] = (),
        tensors: Mapping[str, Tensor] = MappingProxyType({}),
        options: Mapping[str, str] = MappingProxyType({}),
        cache: Mapping[str, Any] | None = None,
        divisible: bool = False,
        kept: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[Tensor, Decision | None]:
        """Prediction for latent ``x`` at a ``timestep`` (`Transformer.inputs`); on every rank the same.

        ``context``, ``references`` and the values of ``kept`` are names of kept tensors. ``kept`` and ``tensors``
        together are those of `Conditioning`, and ``options`` are its.
        With ``cache`` (``settings`` and ``evaluation``) also what the cache decided.

        Raises:
            BatchTooLargeError: the work is ``divisible``, and there is no room for all of it at once; on every rank.
        """
        model = self._model(name)
        part = cast(TransformerComponent, self._part(name, "transformer"))
        missing = [tensor for tensor in (context, *references, *kept.values()) if tensor not in model.kept]
        if missing:
            raise ValueError(f"conditioning {', '.join(missing)} was not sent to the workers")
        kind = model.settings.family.transformer
        x = x.to(self.device, model.settings.dtype)
        inputs = kind.inputs(
            x,
            timestep.to(self.device),
            Conditioning(
                model.kept[context],
                [model.kept[reference] for reference in references],
                {**tensors, **{name: model.kept[tensor] for name, tensor in kept.items()}},
                options,
            ),
        )
        tokens = kind.tokens(inputs)
        evaluation = None if cache is None else Evaluation(**cache["evaluation"])
        lacking = self.residents.bring(name, part, tokens, "" if evaluation is None else evaluation.run, divisible)
        if lacking and divisible:
            raise BatchTooLargeError(
                f"a batch of {len(x)} needs {part.workspace(tokens) / GIB:.2f} GiB beside the {part.label}, "
                f"{lacking / GIB:.2f} GiB more than can be made free on the fullest device"
            )
        decision = None
        if cache is not None and evaluation is not None:
            settings = CacheSettings.from_dict(cache["settings"])
            if self._can_keep(part, settings.order, evaluation, tokens):
                part.cache.plan(settings, evaluation)
            else:
                decision = Decision(True, None, NO_ROOM)
        prediction = kind.evaluate(part.module, inputs, x)
        if self.device.type == "cuda":
            # It is sent next, which waits for it anyway; here the wait counts among the worker's own seconds.
            torch.cuda.synchronize(self.device)
        return prediction, decision or part.cache.last

    def recover(self, alone: bool) -> None:
        """After a request that failed: give back memory that it held, and make room anew next time.

        Args:
            alone: whether it may have failed here alone: ranks make room together, and so this one cannot ask for it.
        """
        gc.collect()  # the traceback is gone, and with it the last that referred to what was half done
        if not alone:
            self.residents.make_room_anew()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def end_run(self, name: str, run: str) -> None:
        """Free what the cache, or the VAE, keeps of a run; nothing where the model is gone."""
        model = self.models.get(name)
        for part in () if model is None else model.components.values():
            if isinstance(part, TransformerComponent) and part.place is not Place.FILE:
                part.cache.forget(run)
            elif isinstance(part, VAEComponent):
                part.forget(run)

    @torch.no_grad()
    def decode(self, name: str, latent: Tensor, piece: Piece = WHOLE) -> Tensor | None:
        """Image in -1..1 from a latent, or the next frames of a run from its next latent ones; on rank 0."""
        return self._autoencode(name, latent, True, piece)

    @torch.no_grad()
    def encode(self, name: str, image: Tensor, piece: Piece = WHOLE) -> Tensor | None:
        """Latent from an image in -1..1, or the next frames of a run; on rank 0."""
        return self._autoencode(name, image, False, piece)

    def _autoencode(self, name: str, x: Tensor, decodes: bool, piece: Piece) -> Tensor | None:
        part = cast(VAEComponent, self._part(name, "vae"))
        pixels = part.pixels(x, decodes, piece)
        if not part.over_ranks:
            self._bring_alone(name, part, pixels)
            if self.rank != 0:
                return None
            return part.decode(x) if decodes else part.encode(x)
        self.residents.bring(name, part, pixels)
        try:
            done = part.together(x, decodes, piece)
        except Exception:
            if part.agreed:  # no rank waits for another, and all of them have dropped the run
                self.residents.make_room_anew()
                self.alone = True
            raise
        return done if self.rank == 0 else None

    def stats(self, name: str) -> dict[str, object]:
        """This rank's figures of a model, under the names that docs/report.md explains."""
        self.alone = True
        return {"rank": self.rank, **self._model(name).stats()}

    def _model(self, name: str) -> HostedModel:
        if name not in self.models:
            raise ValueError(f"the workers hold no model {name}")
        return self.models[name]

    def _part(self, name: str, component: str) -> Component:
        part = self._model(name).components.get(component)
        if part is None:
            path = self._model(name).settings.source.path
            raise ValueError(f"{path} has no {component.replace('_', ' ')}")
        return part

    def _can_keep(self, part: TransformerComponent, order: int, evaluation: Evaluation, tokens: int) -> bool:
        """Whether there is room for what the cache keeps of a conditioning. Collective where that is a new one.

        Those that came first keep theirs: if they made way, each would find its own gone a step later.
        """
        if part.cache.keeps(evaluation):
            return True
        needed = part.residual_bytes(tokens, order)
        beside = part.workspace(tokens) + part.cache.growth_bytes()
        if not self.residents.make_room(part, 0, needed + beside, evaluation.run, needs_step=False):
            return True
        if self._told_of != evaluation.run:
            self.eviction.notify(
                f"no room for the block cache to keep {needed / GIB:.1f} GiB a rank for one more conditioning of this "
                "run beside those that it has: those that are too many are computed in full in each step"
            )
        self._told_of = evaluation.run
        return False

    def _bring_alone(self, name: str, part: Component, size: int) -> None:
        """As `Residents.bring`, for work that one rank then does alone.

        Room is made each time: should that rank run out of memory, the others do not know that there was too little.
        """
        self.residents.make_room_anew()
        self.residents.bring(name, part, size)
        self.residents.make_room_anew()
        self.alone = True
