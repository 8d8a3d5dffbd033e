"""A model in a worker group as its client uses it: encode, predict and decode, with conditioning that is sent once."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...cache.decision import Decision, Evaluation
from ...cache.run import CacheRun
from ...families import Conditioning, VisionImage
from ...loading.adapters import NO_ADAPTERS, AdapterSet
from ...loading.checkpoint import Checkpoint
from ...loading.text_encoder_file import TextEncoderFile
from ...loading.vae_file import VaeFile
from ..errors import BatchTooLargeError, OutOfMemoryError
from ..group_config import ModelConfig
from ..rank.out_of_memory import advice
from ..wire.messages import Adapt, DecodeLatent, Done, EncodeImage, EncodeText, EndRun, Keep, Offload, Predict, Stats
from ..wire.shared_tensors import copy_into
from .adapters import SentAdapters
from .clips import OnPiece, image_pieces, latent_pieces
from .deadlines import SILENCE_SECONDS, StepTimes
from .ranks import Check, Ranks
from .report import make_report, took
from .same_content import looks_the_same, same_content

KEPT_TENSORS, KEPT_BYTES, KEPT_ANYWAY = 64, 2**29, 16
"""Conditioning tensors (contexts, references, what is beside a latent) that stay with the workers, the least recently
used goes first: so many, of so many bytes, or more where they are so few. With fewer than a step uses, each would be
sent anew in each step."""
NAMED_BYTES = 2**16
"""Tensors of `Conditioning` of so many bytes are sent once, as the context is; smaller ones go along with each step."""
VISION = "visual."
"""What names of a text encoder's weights begin with that are its vision tower's."""
KEPT_TIMINGS = 10_000
"""Timings of each kind that a model remembers for its report."""


class RemoteModel:
    """A model that the ranks of a group hold. `WorkerGroup.load` makes it.

    Args:
        group: holds it.
        config: what it was loaded as.
        source: where from.
        name: what the ranks call it.
    """

    def __init__(self, group: Ranks, config: ModelConfig, source: Checkpoint, name: str) -> None:
        self.group, self.config, self.source, self.name = group, config, source, name
        self.loaded = False
        self.formats: dict[str, dict[str, int]] = {}
        """Of rank 0: bytes of each component's weights by what they are held as."""
        self.offloaded: set[str] = set()
        """Components whose device memory was freed and that were not used since."""
        self.lent: dict[str, int] = {}
        """Of components whose device memory was freed, wholly or in part: bytes that the next use takes there."""
        self.seconds: dict[str, Any] = {"load": 0.0}
        self.first_step: float | None = None
        """Seconds of the first evaluation, which compiles where that is asked for."""
        self.reset_timings()
        self.last_run: CacheRun | None = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._stale: set[str] = set()
        """Names that are not used any more, or never were, whose tensors some rank may still have."""
        self._guesses = True
        """Until one is wrong: then conditioning of this kind would be again."""
        self._step_times = StepTimes()
        self._sent_adapters: defaultdict[str, SentAdapters] = defaultdict(SentAdapters)
        """By component."""

    @property
    def ready(self) -> bool:
        """Whether requests can be sent."""
        return self.loaded and self.group.ready

    def offload(self, component: str) -> None:
        """Free the device memory of a component; its next use brings it back. Nothing where the group is gone."""
        with self.group.lock:
            if self.ready:
                answers, _ = self.group.call(Offload(self.group.next_id(), self.name, component), {})
                self.offloaded.add(component)
                self.lent[component] = max(int(answer.data.get("bytes", 0)) for answer in answers)

    def encode_text(
        self,
        ids: Tensor,
        mask: Tensor,
        images: Sequence[VisionImage] = (),
        check: Check = lambda: None,
        adapters: AdapterSet = NO_ADAPTERS,
    ) -> Tensor:
        """Context ``[B, L, C]`` from token ids and mask ``[B, L]`` (int64), and the images that ids refer to.

        ``adapters`` are patches of the weights (LoRA), which stay until others are asked for.

        Raises:
            ValueError: images for a text encoder that cannot look at them, or that do not fit the ids.
        """
        of_vision = {key: of for key, of in adapters.patches.items() if key.startswith(VISION)}
        of_text = {key: of for key, of in adapters.patches.items() if key not in of_vision}

        def adapt() -> None:
            self._adapt("text_encoder", _part_of(adapters, of_text), check)
            if images:
                self._adapt("vision_tower", _part_of(adapters, of_vision), check)

        with self._timed("text", check, adapt):
            request = EncodeText(self.group.next_id(), self.name, [list(image.grid) for image in images])
            tensors = {f"image{index}": image.patches for index, image in enumerate(images)}
            return self._use("text_encoder", request, {"ids": ids, "mask": mask, **tensors}, check)[1]["context"]

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        check: Check = lambda: None,
        cache: tuple[CacheRun, Evaluation] | None = None,
        divisible: bool = False,
        adapters: AdapterSet = NO_ADAPTERS,
    ) -> Tensor:
        """One evaluation of the transformer.

        Args:
            x: latent ``[B, C, H, W]`` (``[B, C, F, H, W]`` where latents have frames).
            timestep: ``[B]``, or ``[B, F]`` of frames; from 0 to the family's `Transformer.timestep_scale`.
            conditioning: its context, references and large tensors are sent when they are new, and named afterwards.
            check: called every 50 ms; may raise to give the step up. The group stays usable.
            cache: has the workers use the block cache: a run, which notes what is decided, and its evaluation. Call
                `end_run` when the run is over.
            adapters: patches of the weights (LoRA), which stay until others are asked for.
            divisible: whether the caller would rather evaluate parts of the batch than more than there is room for.

        Returns:
            The prediction, of the latent's shape, in the model's dtype, on the CPU.

        Raises:
            ValueError: tensors or options that the family does not know, or a latent or reference that it cannot take.
            BatchTooLargeError: there is no room for a ``divisible`` batch. Nothing was computed.
            WorkersFailedError: a rank ended, failed alone, or did not answer in time (`StepTimes.limit`).
        """
        kind = self.source.family.transformer
        unknown = [
            *(name for name in conditioning.tensors if name not in kind.conditioning_tensors),
            *(f"{k}={v}" for k, v in conditioning.options.items() if v not in kind.conditioning_options.get(k, ())),
        ]
        if unknown:
            raise ValueError(f"{kind.title} in the parallel workers does not take {', '.join(unknown)}")
        assert not isinstance(self.source, TextEncoderFile | VaeFile)
        config = self.source.transformer_config
        kind.check_latent(x.shape, config)
        for reference in conditioning.references:
            kind.check_latent(reference.shape, config, "reference latent")
        with self._timed("steps", check, lambda: self._adapt("transformer", adapters, check)):
            large = [name for name, tensor in conditioning.tensors.items() if tensor.nbytes >= NAMED_BYTES]
            given = (conditioning.context, *conditioning.references, *(conditioning.tensors[name] for name in large))
            small = {name: tensor for name, tensor in conditioning.tensors.items() if name not in large}
            tensors = {"x": x, "timestep": timestep, **small}
            shape = (x.shape, *(tensor.shape for tensor in given))
            plan = None
            if cache is not None:
                run, evaluation = cache
                plan = {"settings": run.settings.to_dict(), "evaluation": asdict(evaluation)}

            def request(names: Sequence[str]) -> Predict:
                options = dict(conditioning.options)
                end = len(names) - len(large)
                references, kept = list(names[1:end]), dict(zip(large, names[end:], strict=True))
                return Predict(
                    self.group.next_id(), self.name, names[0], references, kept, options, plan, divisible, first
                )

            names, guesses = self._names(given, check)
            wrong: list[str] = []
            limit, first = self._step_times.limit(shape), self._step_times.is_first(shape)
            began = time.perf_counter()
            answers, results = self._use(
                "transformer", request(names), tensors, check, limit, lambda: wrong.extend(self._wrong(guesses))
            )
            if wrong:  # hardly ever: the sample misses what differs
                self._guesses = False
                if cache is not None:
                    self.end_run(run)
                names, _ = self._names(given, check)
                began = time.perf_counter()
                answers, results = self._use("transformer", request(names), tensors, check, limit)
            if "too_large" in answers[0].data:
                raise BatchTooLargeError(answers[0].data["too_large"])
            decision = None if cache is None else Decision(**answers[0].data)
            seconds = max(answer.seconds for answer in answers)
            self.seconds["workers"].append(seconds)
            if decision is None or decision.computed:
                self._step_times.add(shape, seconds)
            if decision is not None:
                run.note(evaluation, decision, time.perf_counter() - began)
                self.last_run = run
            prediction = torch.empty_like(results["prediction"])
            copy_into(prediction, results["prediction"])  # the next one comes in the same memory
            return prediction

    def _adapt(self, component: str, adapters: AdapterSet, check: Check) -> None:
        """Have a component's weights be changed by a set, and by nothing else."""
        sent = self._sent_adapters[component]
        if adapters.name == sent.applied:
            return
        tensors, forget = sent.prepare(adapters)
        request = Adapt(self.group.next_id(), self.name, component, adapters.name, forget)
        self._use(component, request, tensors, check)
        sent.done(adapters)

    def end_run(self, run: CacheRun) -> None:
        """Have the workers free what their cache keeps of a run. It is asked for, not waited for, and never raises.

        So Cancel returns at once, whatever step the workers are in, and the error that ended a run stays the one that
        is seen.
        """
        self._forget_run(run.id)

    def _forget_run(self, name: str) -> None:
        with self.group.lock:
            self.group.post(EndRun(self.group.next_id(), self.name, name))

    def decode(self, latent: Tensor, check: Check = lambda: None, on_piece: OnPiece = lambda *_: None) -> Tensor:
        """Image of about -1..1 (fp32) from a latent; shapes are those of `VAE.decode`.

        A clip is decoded a few frames at a time. Where ``check`` raises, the workers finish those and no more.

        Args:
            latent: of this model's kind.
            check: called every 50 ms; may raise to give up. The group stays usable.
            on_piece: told how many pieces of how many are decoded.

        Raises:
            ValueError: the latent is not of this model's kind.
            OutOfMemoryError, RequestFailedError: a rank failed, and all are as good as before.
            WorkersFailedError: the group is gone.
        """
        pieces = latent_pieces(self.source, latent)
        with self._timed("decode", check):
            return self._in_pieces(DecodeLatent, "latent", "image", pieces, check, on_piece)

    def encode(self, image: Tensor, check: Check = lambda: None, on_piece: OnPiece = lambda *_: None) -> Tensor:
        """Latent (fp32) from an image in -1..1; shapes and errors as of `decode`."""
        pieces = image_pieces(self.source, image)
        with self.group.held(check):
            return self._in_pieces(EncodeImage, "image", "latent", pieces, check, on_piece)

    def _in_pieces(
        self,
        kind: type[DecodeLatent] | type[EncodeImage],
        given: str,
        answer: str,
        pieces: Sequence[Tensor],
        check: Check,
        on_piece: OnPiece,
    ) -> Tensor:
        """A clip through the VAE, piece by piece; what comes of them is put together along dim 2."""
        run, done = f"v{self.group.next_id()}", []
        try:
            for index, piece in enumerate(pieces, start=1):
                request = kind(self.group.next_id(), self.name, run, index == 1, index == len(pieces))
                done.append(self._use("vae", request, {given: piece}, check)[1][answer])
                on_piece(index, len(pieces))
        except BaseException:
            if len(pieces) > 1:
                self._forget_run(run)
            raise
        return done[0] if len(done) == 1 else torch.cat(done, dim=2)

    def report(self) -> dict[str, Any]:
        """The report that docs/report.md explains, field by field."""
        with self.group.lock:
            ranks = [done.data for done in self.group.call(Stats(self.group.next_id(), self.name), {})[0]]
        cache = None if self.last_run is None else self.last_run.report()
        group = self.group
        seconds = {"start": group.start_seconds, "imports": group.import_seconds, "first_step": self.first_step}
        seconds |= self.seconds
        return make_report(self.config, self.source.family.name, seconds, ranks, cache)

    def quantized(self) -> str:
        """What quantized weights are held as and how they are multiplied, for people; empty where there are none."""
        return ", ".join(dict.fromkeys(name for held in self.formats.values() for name in held if "(" in name))

    def took(self) -> str:
        """How long starting, loading and the first step took, which compiles where that is asked for; for people."""
        compiled = self.first_step if self.config.speed.compile else None
        return took(self.group.start_seconds, self.group.import_seconds, self.seconds["load"], compiled)

    def loras(self) -> str:
        """The LoRAs that change its weights now, by component; for people. Empty where there are none."""
        on = {component: sent.title for component, sent in self._sent_adapters.items() if sent.title}
        if on.keys() <= {"transformer"}:
            return f"LoRA: {on['transformer']}" if on else ""
        return "\n".join(f"LoRA on the {component.replace('_', ' ')}: {title}" for component, title in on.items())

    def reset_timings(self) -> None:
        """Begin the report's timings of text, steps and decoding anew."""
        self.seconds.update({name: deque(maxlen=KEPT_TIMINGS) for name in ("text", "steps", "workers", "decode")})

    @contextmanager
    def advised(self, component: str) -> Iterator[None]:
        """Where a component runs out of memory within, the error says what would help."""
        try:
            yield
        except OutOfMemoryError as error:
            raise error.with_advice(advice(self.config, self.source, component)) from None

    def _use(
        self,
        component: str,
        request: Any,
        tensors: Mapping[str, Tensor],
        check: Check,
        limit: float | None = SILENCE_SECONDS,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[list[Done], dict[str, Tensor]]:
        """A request that brings a component onto the devices."""
        self.offloaded.discard(component)
        self.lent.pop(component, None)
        with self.advised(component):
            return self.group.call(request, tensors, check, limit=limit, meanwhile=meanwhile)

    @contextmanager
    def _timed(self, name: str, check: Check, prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds the group's lock and notes the seconds of what succeeded after ``prepare``."""
        with self.group.held(check):
            prepare()
            began = time.perf_counter()
            yield
            self.seconds[name].append(time.perf_counter() - began)
            if name == "steps" and self.first_step is None:
                self.first_step = self.seconds[name][-1]

    def _names(self, tensors: Sequence[Tensor], check: Check) -> tuple[list[str], dict[str, Tensor]]:
        """The names of conditioning tensors, and of those that are guessed the content, which is still to be compared.

        That takes milliseconds for a large one, in which the workers can be at work already.
        """
        names: list[str] = []
        guesses: dict[str, Tensor] = {}
        for tensor in tensors:
            last_used_first = reversed(self._kept) if self._guesses else ()
            likely = next((name for name in last_used_first if looks_the_same(self._kept[name], tensor)), None)
            if likely is None or likely in guesses:
                names.append(self._name(tensor, names, check))
            else:
                names.append(likely)
                guesses[likely] = tensor
                self._kept.move_to_end(likely)
        return names, guesses

    def _wrong(self, guesses: Mapping[str, Tensor]) -> list[str]:
        """Names that were guessed and are those of something else."""
        return [name for name, tensor in guesses.items() if not same_content(self._kept[name], tensor)]

    def _name(self, tensor: Tensor, in_use: Sequence[str], check: Check) -> str:
        """The name that a conditioning tensor has with the workers, who get it if they do not have it.

        The least recently used makes room for it, but none that is ``in_use``.

        Samplers build the tensor anew for each step, so it is known by its content.
        """
        for name, kept in self._kept.items():
            if same_content(kept, tensor):
                self._kept.move_to_end(name)
                return name
        number = self.group.next_id()
        name = f"t{number}"
        spare = [kept for kept in self._kept if kept not in in_use]
        while spare and self._keeps_enough(tensor.nbytes):
            old = spare.pop(0)
            del self._kept[old]
            self._stale.add(old)
        forget = sorted(self._stale)
        # Known once all ranks have said that they have it: where check() gives up the wait, one may have failed.
        self._stale.add(name)
        self.group.call(Keep(number, self.name, forget), {name: tensor}, check)
        self._stale.difference_update(forget, [name])
        self._kept[name] = tensor.clone()
        return name

    def _keeps_enough(self, new: int) -> bool:
        """Whether something is to make room for a tensor of so many bytes."""
        size = new + sum(kept.nbytes for kept in self._kept.values())
        return len(self._kept) >= (KEPT_TENSORS if size <= KEPT_BYTES else min(KEPT_ANYWAY, KEPT_TENSORS))


def _part_of(adapters: AdapterSet, patches: Mapping[str, Any]) -> AdapterSet:
    """Some patches of a set, for a component of its own."""
    return AdapterSet(adapters.name, patches, adapters.title) if patches else NO_ADAPTERS
