"""Notices between the hosts of a group, in the store that torchrun's rendezvous runs on.

Every notice has its key from the start and is overwritten, so that all of them are read at once and none pile up. The
store is open to everybody who reaches its port: no notice is more than text and numbers.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from ..wire.messages import Failed, Progress, decode, encode
from .notices import Card, HostNotice

STORE_SECONDS = 5.0
"""How long the store may take to answer."""
_CARD = "hybrid-dit/card"


@dataclass(frozen=True)
class View:
    """All notices at one moment: by host, from host 1 on, and by rank."""

    hosts: dict[int, HostNotice]
    beats: dict[int, str]
    failed: list[Failed] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)


class NoticeStore:
    """The notices of one group.

    Args:
        store: a connection to the group's store; whoever may have to wait for an answer has one of his own.
        card: of the group.
    """

    def __init__(self, store: Store, card: Card) -> None:
        self._store = PrefixStore(f"hybrid-dit/{card.nonce}", store)
        each = card.ranks // card.hosts
        self._hosts, self._ranks = range(1, card.hosts), range(each, card.ranks)

    @staticmethod
    def publish(store: Store, card: Card) -> NoticeStore:
        """Put up the notices of a new group."""
        found = NoticeStore(store, card)
        for key in found._keys():
            found._store.set(key, "")
        store.set(_CARD, card.to_json())
        return found

    def _keys(self) -> list[str]:
        kinds: Iterable[tuple[str, range]] = (
            ("host", self._hosts),
            ("beat", self._hosts),
            ("failed", self._ranks),
            ("progress", self._ranks),
        )
        return [f"{kind}/{number}" for kind, numbers in kinds for number in numbers]

    def claim(self, host: int, notice: HostNotice) -> HostNotice:
        """Join as a host unless somebody has; the notice that is there now."""
        return HostNotice.from_json(self._store.compare_set(f"host/{host}", "", notice.to_json()))

    def tell(self, host: int, notice: HostNotice) -> None:
        """Say how a host is; returns once the store has it."""
        self._store.set(f"host/{host}", notice.to_json())
        self._store.get(f"host/{host}")

    def beat(self, host: int, count: int) -> None:
        """Say that a host is alive; returns once the store has answered."""
        self._store.set(f"beat/{host}", str(count))
        self._store.get(f"beat/{host}")

    def forward(self, message: Failed | Progress) -> None:
        """What a rank of another host than the first says while others are at work."""
        kind = "failed" if isinstance(message, Failed) else "progress"
        self._store.set(f"{kind}/{message.rank}", encode(message, []).decode())

    def read(self) -> View:
        """Everything there is.

        Raises:
            ValueError: somebody has written what is no notice.
            RuntimeError: the store does not answer.
        """
        view = View({}, {})
        for key, data in zip(self._keys(), self._store.multi_get(self._keys()), strict=True):
            kind, _, number = key.partition("/")
            if kind == "host":
                view.hosts[int(number)] = HostNotice.from_json(data) if data else HostNotice()
            elif kind == "beat":
                view.beats[int(number)] = data.decode(errors="replace")
            elif data:
                message, _ = decode(data)
                if isinstance(message, Failed):
                    view.failed.append(message)
                elif isinstance(message, Progress):
                    view.progress.append(message)
        return view


def connect(address: str, port: int) -> TCPStore:
    """A connection to the store of a group.

    Raises:
        OSError: nobody listens there.
        RuntimeError: somebody does, who is no store.
    """
    # torch would try for seconds, and print its stack when it gives up.
    with socket.create_connection((address, port), STORE_SECONDS):
        pass
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS))


def read_card(store: Store) -> Card:
    """The card of the group whose store this is.

    Raises:
        ValueError: it is no card of this version.
        RuntimeError: there is none.
    """
    return Card.from_json(store.get(_CARD))
