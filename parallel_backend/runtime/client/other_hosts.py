"""The client's eye on the other hosts of a group: who has joined, who is silent, and what ranks there say."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..host_address import Hosts
from ..hosts.notices import Card, HostNotice
from ..wire.messages import Failed, Progress

if TYPE_CHECKING:
    from ..hosts.notice_store import View

POLL_SECONDS = 0.25
LOST_SECONDS = 10.0
"""A host that has not been heard of for so long is lost."""
DOUBT_SECONDS = 2.5
"""After so long it may be: what fails meanwhile fails since it is."""
VERDICT_SECONDS = 3.5
"""How long a host may take to tell that something happened to its ranks."""
JOIN_SECONDS = 300.0
"""How long hosts may take to join."""


class OtherHosts:
    """Reads the notices of a group over several hosts, in a thread of its own; of one host there is nothing to read.

    Args:
        hosts: of the group.
        card: of the group; None where it has one host only.
    """

    def __init__(self, hosts: Hosts, card: Card | None) -> None:
        self._hosts, self._card = hosts, card
        self._lock = threading.Lock()
        self._notices = {host: HostNotice() for host in range(1, hosts.count)}
        self._heard: dict[int, tuple[str, float]] = {}
        self._news: dict[tuple[type, int], Failed | Progress] = {}
        self._unread: list[Failed | Progress] = []
        self._closed = threading.Event()
        self._read_at = self._began = time.monotonic()
        self._left: dict[int, float] = {}
        self.patience = VERDICT_SECONDS if hosts.several else 0.0
        """How long to wait for what they have to say where something fails here."""

    def start(self, address: str) -> None:
        """Begin to read, at the address where the agent has the group's store."""
        self._read_at = self._began = time.monotonic()
        if self._card is not None:
            threading.Thread(target=self._run, args=(address, self._card), name="other hosts", daemon=True).start()

    def close(self) -> None:
        """Read no more."""
        self._closed.set()

    def _run(self, address: str, card: Card) -> None:
        from ..hosts.notice_store import NoticeStore, connect  # torch may have been built without what this needs

        notices: NoticeStore | None = None
        while not self._closed.wait(POLL_SECONDS):
            # Where the store is gone, so is the agent, which the client notices by itself.
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                notices = notices or NoticeStore(connect(address, self._hosts.port), card)
                self._note(notices.read(), time.monotonic())

    def _note(self, view: View, now: float) -> None:
        with self._lock:
            self._notices, self._read_at = view.hosts, now
            for host, beat in view.beats.items():
                if view.hosts[host].state == "left":
                    self._left.setdefault(host, now)
                elif view.hosts[host].state in ("joined", "up") and self._heard.get(host, ("", 0.0))[0] != (
                    beat or "0"
                ):
                    self._heard[host] = (beat or "0", now)
            messages: list[Failed | Progress] = [*view.failed, *view.progress]
            for message in messages:
                if self._news.get((type(message), message.rank)) != message:
                    self._news[type(message), message.rank] = message
                    self._unread.append(message)

    # --- what the client asks ----------------------------------------------------------------------------------------

    def ranks_up(self) -> int:
        """How many ranks of the others are."""
        with self._lock:
            return sum(notice.ranks_up for notice in self._notices.values())

    def all_up(self) -> bool:
        """Whether all ranks of all of them are."""
        with self._lock:
            return all(notice.state == "up" for notice in self._notices.values())

    def wanted(self) -> str:
        """What the user has to do for those that have not joined; empty where all have."""
        with self._lock:
            missing = [host for host, notice in self._notices.items() if not notice.state]
        return "; ".join(f"waiting for host {host}: run there: {self._hosts.command(host)}" for host in missing)

    def news(self) -> list[Failed | Progress]:
        """What their ranks have said since the last time."""
        with self._lock:
            unread, self._unread = self._unread, []
        return unread

    def trouble(self) -> str | None:
        """What has happened to one of them, if anything has."""
        with self._lock:
            notices = dict(self._notices)
        for host, notice in notices.items():
            if notice.state == "died":
                return f"{self.name(host)}: {notice.text}"
            if notice.state == "refused":
                return f"{self.name(host)} cannot take part: {notice.text}"
        for host, notice in notices.items():
            if self._silence(host) > LOST_SECONDS:
                return f"{self.name(host)} has not been heard of for {LOST_SECONDS:.0f} s"
            if self._read_at - self._left.get(host, self._read_at) > VERDICT_SECONDS and not self.in_doubt():
                return f"{self.name(host)}: {notice.text}"
        if self._read_at - self._began > JOIN_SECONDS and self.wanted():
            return f"after {JOIN_SECONDS:.0f} s still {self.wanted()}"
        return None

    def broken(self) -> bool:
        """Whether any of them cannot go on."""
        return bool(self._left) or self.trouble() is not None

    def verdict(self, check: Callable[[], None]) -> str | None:
        """What has happened to one of them, as far as it turns out soon; for when something fails here.

        Args:
            check: called again and again meanwhile; may raise to give up.
        """
        until = time.monotonic() + self.patience
        while time.monotonic() < until or self.in_doubt():
            trouble = self.trouble()
            if trouble is not None:
                return trouble
            check()
            time.sleep(0.05)
        return None

    def in_doubt(self) -> bool:
        """Whether one of them is silent, and may turn out to be lost."""
        if time.monotonic() - self._read_at > DOUBT_SECONDS:  # the store is gone, and tells nothing any more
            return False
        return any(self._silence(host) > DOUBT_SECONDS for host in self._notices)

    def _silence(self, host: int) -> float:
        """Seconds without a beat of a host that should give some, up to when the notices were read."""
        with self._lock:
            beating = host in self._heard and self._notices[host].state in ("joined", "up")
            return self._read_at - self._heard[host][1] if beating else 0.0

    def name(self, host: int) -> str:
        """How a host is called in messages, with the ranks on it."""
        with self._lock:
            notice = self._notices[host]
        ranks = self._hosts.ranks_of(host, self._card.ranks) if self._card is not None else range(1)
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        where = f"{notice.name}, {notice.address}; " if notice.name else ""
        return f"host {host} ({where}{which})"

    def log_of(self, rank: int) -> str | None:
        """Where the log of a rank is that is on one of the others."""
        with self._lock:
            for host, notice in self._notices.items():
                if self._card is not None and rank in self._hosts.ranks_of(host, self._card.ranks):
                    return f"{notice.logs}/rank-{rank}.log on {notice.name}"
        return None
