"""Signs that a rank gets on with a forward that may take any time: its first of a size, on a machine nobody knows.

The host runs ahead of a GPU, and then waits for it, so blocks that have begun tell little. Where somebody watches, each
block leaves an event behind, which passes when the GPU has come so far.
"""

from __future__ import annotations

from collections import deque

import torch

_given = 0
_events: deque[torch.cuda.Event] = deque()
_watched = False


def watch(wanted: bool) -> None:
    """Whether blocks leave events behind from now on; forgets those of earlier forwards."""
    global _watched
    _watched = wanted
    _events.clear()


def give() -> None:
    """Something was done that could take long, such as moving a weight."""
    global _given
    _given += 1


def block(device: torch.device) -> None:
    """A block of a model begins on a device."""
    global _given
    _given += 1
    if _watched and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        event = torch.cuda.Event()
        event.record()
        _events.append(event)


def count() -> int:
    """Signs so far, those of the GPU included. Called in another thread than the others."""
    global _given
    while _events and _events[0].query():
        _events.popleft()
        _given += 1
    return _given
