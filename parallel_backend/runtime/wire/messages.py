"""What client and workers say to each other: small typed messages, as JSON. Tensors travel beside them (`channel`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from .field_checks import Fields

MAX_TEXT = 5_000
"""Characters of a free text (such as a traceback) that a message carries: a packet has a limit, a character takes up to
12 bytes of JSON, and `Failed` has two texts."""


class BadMessageError(ValueError):
    """What arrived is no message, or its tensors are not as it says: the other end is broken, or not ours."""


@dataclass(frozen=True)
class Hello:
    """A rank is up: its first message."""

    rank: int
    pid: int


@dataclass(frozen=True)
class Load:
    """Load a checkpoint and call it ``model``; nothing is done where that name is loaded already.

    Degrees are those of the layout, dtype is a torch dtype's name. ``fp8`` and ``encoder_memory`` are
    those of `ModelConfig`. ``orphans`` are models that nobody refers to any more: they go first where room is needed.
    ``content`` is the `content_digest` that the checkpoint must have on all hosts; empty where there is one host.
    ``part`` is that of `open_checkpoint`. The last three are those of `Speed`.
    """

    id: int
    model: str
    path: str
    ulysses: int
    ring: int
    tp: int
    dtype: str
    fp8: str = "cast"
    encoder_memory: str = "auto"
    orphans: list[str] = field(default_factory=list)
    content: str = ""
    part: str = ""
    compile: bool = False
    cuda_graphs: bool = False
    copy_engines: bool = False


@dataclass(frozen=True)
class Offload:
    """Free the device memory of one component of a model, which is brought back when it is used next."""

    id: int
    model: str
    component: str


@dataclass(frozen=True)
class Lend:
    """Free so many bytes of the devices of some ranks, with the least that helps; the next use brings back what moved.

    Each rank's answer says how many it ``freed``, how many of weights are ``left``, and what it has ``lent``: model ->
    component -> bytes.
    """

    id: int
    size: int
    ranks: list[int]


@dataclass(frozen=True)
class Unload:
    """Free a model for good."""

    id: int
    model: str


@dataclass(frozen=True)
class EncodeText:
    """Encode token ids and mask ``[B, L]`` (tensors ``ids``, ``mask``); rank 0 answers with ``context``.

    ``grids`` has time, rows and columns of each image's patches, which come along as ``image0``, ``image1`` ...
    """

    id: int
    model: str
    grids: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Keep:
    """Keep the tensors that come along under their names, and forget the ones named in ``forget``."""

    id: int
    model: str
    forget: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Adapt:
    """Have a component's weights be those of its file with a set of patches (LoRA), and with no others.

    ``set`` names it. The tensor ``index`` is JSON: the patches as `adapters.described` has them, and where in the bytes
    of ``data`` their new tensors are. All are kept for sets to come, but those named in ``forget``.
    """

    id: int
    model: str
    component: str
    set: str
    forget: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Predict:
    """One evaluation of the transformer on tensors ``x``, ``timestep``; rank 0 answers with ``prediction``.

    ``context``, ``references`` and the values of ``kept`` are names of kept tensors; ``options``, and as tensors those
    of ``kept`` and all others that come along, are those of `Conditioning`. ``cache`` has the cache's ``settings`` and
    the ``evaluation``; each rank's answer then says what was decided. ``divisible`` says that the client would rather
    have parts of the batch evaluated than too much at once: then each rank may answer with ``too_large``, why, and with
    nothing else. ``first`` says that no other of its size went before: it may take any time, and ranks say meanwhile
    that they get on.
    """

    id: int
    model: str
    context: str
    references: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    divisible: bool = False
    first: bool = False


@dataclass(frozen=True)
class EndRun:
    """A run of a sampler or of a VAE has ended: free what the cache or the VAE keeps of it."""

    id: int
    model: str
    run: str


@dataclass(frozen=True)
class DecodeLatent:
    """Decode tensor ``latent``, the first or the next frames of a ``run``; rank 0 answers with ``image``."""

    id: int
    model: str
    run: str = ""
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class EncodeImage:
    """Encode tensor ``image``, the first or the next frames of a ``run``; rank 0 answers with ``latent``."""

    id: int
    model: str
    run: str = ""
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class Stats:
    """Ask each rank for its figures of a model."""

    id: int
    model: str


@dataclass(frozen=True)
class Progress:
    """A rank's progress in loading, in bytes; of ``total`` 0: that it gets on with what else it does, another time."""

    rank: int
    done: int
    total: int


@dataclass(frozen=True)
class Notice:
    """What users should find in the log, such as a model that is moved out of another one's way."""

    text: str


@dataclass(frozen=True)
class Done:
    """A request is carried out."""

    id: int
    rank: int
    seconds: float
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A request failed. ``bad_input`` says that the request was at fault and that the rank is as good as before.

    ``out_of_memory`` has the bytes that were asked for (0: not known) and those that were free. Ranks whose
    ``collectives`` (begun so far) are equal have stopped at the same place; None: not known. ``alone`` says that no
    other rank waits for what failed, and that nothing has changed that ranks must have alike.

    ``device`` says what it runs on, and ``device_failed`` that it can do nothing there any more. ``axis`` names one on
    which an exchange of this rank did not end within ``seconds``, in which it waited for ranks ``unreached``; in no
    seconds, something else arrived than they had sent.
    """

    id: int
    rank: int
    error: str
    bad_input: bool
    traceback: str = ""
    out_of_memory: list[int] | None = None
    collectives: int | None = None
    alone: bool = False
    device: str = ""
    device_failed: bool = False
    axis: str = ""
    unreached: list[int] = field(default_factory=list)
    seconds: float = 0.0


Message = (
    Hello
    | Load
    | Offload
    | Lend
    | Unload
    | EncodeText
    | Keep
    | Adapt
    | Predict
    | EndRun
    | DecodeLatent
    | EncodeImage
    | Stats
    | Progress
    | Notice
    | Done
    | Failed
)
_KINDS = {kind.__name__: (kind, Fields.of(kind)) for kind in Message.__args__}  # type: ignore[attr-defined]
_PARTS = {"type", "fields", "tensors"}


def encode(message: Message, tensors: list[dict[str, Any]]) -> bytes:
    """A message and the descriptions of its tensors as bytes."""
    fields = {key: value[-MAX_TEXT:] if isinstance(value, str) else value for key, value in asdict(message).items()}
    return json.dumps({"type": type(message).__name__, "fields": fields, "tensors": tensors}).encode()


def decode(data: bytes) -> tuple[Message, list[Any]]:
    """The way back: a message whose fields are as its class states, and a list that `channel` takes apart.

    Raises:
        BadMessageError: the bytes are something else.
    """
    try:
        content = json.loads(data)
        kind, known = _KINDS[content["type"]]
        fields, tensors = content["fields"], content["tensors"]
        if content.keys() != _PARTS or type(fields) is not dict or type(tensors) is not list:
            raise ValueError("it is not made of type, fields and tensors")
        known.verify(fields)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadMessageError(f"not a message of this version: {data[:200]!r} ({error!r})") from None
    return kind(**fields), tensors
