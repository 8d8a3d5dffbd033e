"""How one of the other hosts finds a group and joins it, unless something is in the way, which both sides then know."""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch.distributed import Store

from ...planning.devices import Devices, resolve_devices
from ..host_address import Hosts
from .network import interface_variables, local_address, resolve
from .notice_store import STORE_SECONDS, NoticeStore, connect, read_card
from .notices import Card, HostNotice, versions

POLL_SECONDS = 1.0
Say = Callable[[str], None]
"""Tells the user of this host something."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Offer:
    """What a host is to be in groups.

    Args:
        hosts: of the groups.
        host: which of them this is, from 1 on.
        owner: names the command that offers this host.
        devices: as `resolve_devices` takes them.
        ranks: here; None: as many as a group wants.
    """

    hosts: Hosts
    host: int
    owner: str
    devices: str = "auto"
    ranks: int | None = None


@dataclass(frozen=True)
class Joined:
    """A group that this host has joined: its card, the first host's address, and what the others know of this one."""

    card: Card
    address: str
    store: Store
    devices: Devices
    notice: HostNotice


def join(offer: Offer, say: Say) -> Joined:
    """Wait for a group that this host can take part in, and has not before, and join it."""
    while True:
        address, store = _wait_for_store(offer.hosts, say)
        try:
            joined = _try(offer, address, store, say)
        except (ValueError, RuntimeError) as error:
            say(f"no group that this host can join listens at {offer.hosts.endpoint} ({_first_line(error)})")
            joined = None
            time.sleep(STORE_SECONDS)
        if joined is not None:
            return joined


def _wait_for_store(hosts: Hosts, say: Say) -> tuple[str, Store]:
    said = ""
    while True:
        try:
            address = resolve(hosts.address)
            return address, in_time(functools.partial(connect, address, hosts.port))
        except (OSError, RuntimeError, ValueError) as error:
            reason = "" if isinstance(error, ConnectionRefusedError) else f" ({_first_line(error)})"
        text = f"waiting for a group at {hosts.endpoint}{reason}"
        if text != said:
            say(text)
            said = text
        time.sleep(POLL_SECONDS)


def _try(offer: Offer, address: str, store: Store, say: Say) -> Joined | None:
    """Join the group of a store; where that cannot be, say so and wait until the group is gone."""
    card = in_time(lambda: read_card(store))
    notices = NoticeStore(store, card)
    notice = HostNotice("joined", offer.owner, socket.gethostname(), local_address(address))
    devices, problem = None, ""
    try:
        devices = check(card, offer)
        interface_variables(address)
    except ValueError as error:
        problem = str(error)
        notice = replace(notice, state="refused", text=problem)
    there = in_time(lambda: notices.claim(offer.host, notice))
    if there == notice and devices is not None and not problem:
        return Joined(card, address, store, devices, notice)
    if there.owner != offer.owner:
        say(f"host {offer.host} of the group is {there.name} already; start this command with another --node-rank")
    elif problem:
        say(f"this host cannot take part in the group: {problem}")
    _wait_for_end(notices)
    return None


def _wait_for_end(notices: NoticeStore) -> None:
    while True:
        try:
            in_time(notices.read)
        except (RuntimeError, ValueError):
            return
        time.sleep(POLL_SECONDS)


def check(card: Card, offer: Offer) -> Devices:
    """The devices that this host gives to a group.

    Raises:
        ValueError: it cannot take part in it.
    """
    if card.hosts != offer.hosts.count:
        raise ValueError(f"the group has {card.hosts} hosts, but --nnodes is {offer.hosts.count} here")
    ranks = Hosts(card.hosts, offer.hosts.endpoint).ranks_each(card.ranks)
    if offer.ranks not in (None, ranks):
        raise ValueError(
            f"the layout has {card.ranks} ranks, {ranks} on each of {card.hosts} hosts, but --nproc-per-node is "
            f"{offer.ranks} here; leave it out, or choose degrees whose product is {card.hosts * (offer.ranks or 0)}"
        )
    here = versions()
    others = {name: version for name, version in card.versions.items() if here.get(name) != version}
    if others:
        listed = ", ".join(f"{name} {here.get(name)} here and {theirs} there" for name, theirs in others.items())
        raise ValueError(f"this host and the first one have different software: {listed}; install the same on both")
    if card.device == "cpu" and offer.devices in ("auto", "cpu"):
        return Devices("cpu")
    devices = resolve_devices(offer.devices, ranks)
    if devices.kind != card.device:
        kinds = {"cpu": "the CPU", "cuda": "GPUs"}
        raise ValueError(
            f"the group runs on {kinds[card.device]}, but this host would on {kinds[devices.kind]} "
            f"(--devices {offer.devices})"
        )
    return devices


def in_time(ask: Callable[[], _Answer]) -> _Answer:
    """What a store answers.

    A connection that is cut while the store answers waits for ever: whoever asks is then left behind.

    Raises:
        RuntimeError: it does not, within twice the time that it may take.
        OSError, ValueError: see what is asked.
    """
    answers: list[_Answer] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            answers.append(ask())
        except (OSError, RuntimeError, ValueError) as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * STORE_SECONDS)
    if errors:
        raise errors[0]
    if not answers:
        raise RuntimeError("the store does not answer")
    return answers[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
