"""Notices between the hosts of a group: what they are to know of it, and how each of them is. No torch is needed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import secrets
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from ... import __version__
from ..host_address import Hosts
from ..wire.field_checks import Fields

MAX_TEXT = 3000
"""Characters of a text in a notice."""
_PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Card:
    """What hosts must know of a group to join it. ``nonce`` is its own: nobody takes it for an earlier one.

    ``versions`` has those of the packages that all hosts must have alike, and ``code`` of this one.
    """

    nonce: str
    hosts: int
    ranks: int
    device: str
    versions: dict[str, str]

    @classmethod
    def create(cls, hosts: Hosts, ranks: int, device: str) -> Card:
        """Of a new group, with the versions of this host."""
        return cls(secrets.token_hex(8), hosts.count, ranks, device, versions())

    def to_json(self) -> str:
        """The card as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        """The way back.

        Raises:
            ValueError: the text is no card of this version.
        """
        return _read(cls, text)


@dataclass(frozen=True)
class HostNotice:
    """How one of the other hosts is.

    Args:
        state: ``"joined"``; ``"up"``: all its ranks are; ``"refused"``: it cannot take part; ``"died"``: a rank ended;
            ``"left"``: its ranks ended since others had.
        owner: who wrote it, so that nobody joins twice, nor two as the same host.
        name, address: of the host.
        ranks_up: how many of its ranks are.
        text: why it refused, or how the rank died.
        logs: the folder there.
    """

    state: str = ""
    owner: str = ""
    name: str = ""
    address: str = ""
    ranks_up: int = 0
    text: str = ""
    logs: str = ""

    def to_json(self) -> str:
        """The notice as text, its end where it is long."""
        fields = {name: value[-MAX_TEXT:] if isinstance(value, str) else value for name, value in asdict(self).items()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str | bytes) -> HostNotice:
        """The way back.

        Raises:
            ValueError: the text is no notice of this version.
        """
        return _read(cls, text)


@cache
def versions() -> dict[str, str]:
    """Of what all hosts must have alike, on this one."""
    found = {"hybrid-dit": __version__, "code": _code_digest()}
    for package in _PACKAGES:
        found[package] = importlib.metadata.version(package)
    return found


def _code_digest() -> str:
    """Tells one state of this package's source from another, whatever its version says."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[2]
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


_FIELDS = {kind: Fields.of(kind) for kind in (Card, HostNotice)}
_Kind = TypeVar("_Kind", Card, HostNotice)


def _read(kind: type[_Kind], text: str | bytes) -> _Kind:
    try:
        fields = json.loads(text)
        if type(fields) is not dict:
            raise ValueError(f"a {type(fields).__name__}")
        _FIELDS[kind].verify(fields)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a {kind.__name__} of this version: {text[:200]!r} ({error})") from None
    return kind(**fields)
