"""What is true of the workers now: one small text on the nodes that load and lay out models, in every open tab.

ComfyUI's own progress texts go to one tab, stay when they are no longer true, and take the place of the node's own.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from server import PromptServer

from ..parallel_backend.runtime.client.groups import find_group
from ..parallel_backend.runtime.group_config import ModelConfig

log = logging.getLogger(__name__)

EVENT = "hybrid_dit.state"
"""What web/state.js listens to: `_Shown.message`."""
HIDDEN = [io.Hidden.unique_id, io.Hidden.extra_pnginfo]
"""What `Place.of` needs of a node."""
GREETING_SECONDS = 30.0
"""A tab is connected some time before it listens: so long it is told again. (The pack has no routes to ask at.)"""
KEPT = 256
"""Nodes whose state is known; the one that ran longest ago goes first."""
LOOK_SECONDS = 1.0
"""How often it is looked whether workers are still there, and whether a tab has been opened."""


@dataclass(frozen=True)
class Place:
    """A node: its id as ComfyUI runs it (``"3:7"`` in a subgraph), and the workflow's, empty where it has none."""

    graph: str
    node: str

    @classmethod
    def of(cls, hidden: Any) -> Place:
        """Where a node stands whose hidden inputs are `HIDDEN`."""
        workflow = (hidden.extra_pnginfo or {}).get("workflow") or {}
        return cls(str(workflow.get("id") or ""), str(hidden.unique_id))


class _Shown:
    """What a place shows, and what was last sent of it."""

    def __init__(self, place: Place, text: Callable[[], str]) -> None:
        self.place, self.text = place, text
        self.sent, self.number = "", 0

    def message(self) -> dict[str, Any]:
        return {"graph": self.place.graph, "node": self.place.node, "text": self.sent, "number": self.number}


_lock = threading.Lock()
_shown: OrderedDict[Place, _Shown] = OrderedDict()
_busy: dict[ModelConfig, str] = {}
"""Models that somebody waits for, and how far they are."""
_numbers = itertools.count(1)
_watcher: threading.Thread | None = None
_tabs: dict[str, tuple[Any, float]] = {}
"""Connections, and until when they are told everything."""


def show(place: Place, text: Callable[[], str]) -> None:
    """Have a node show a text from now on, as it is at any time; an empty one is no text."""
    global _watcher
    with _lock:
        shown = _shown[place] = _shown.pop(place) if place in _shown else _Shown(place, text)
        shown.text = text
        for place in list(_shown)[:-KEPT]:
            _tell(_shown.pop(place), "")
        if _watcher is None:
            _watcher = threading.Thread(target=_watch, name="state of the workers", daemon=True)
            _watcher.start()
    refresh()


def no_text() -> str:
    """Of a node about which there is nothing to say."""
    return ""


def set_progress(config: ModelConfig, text: str | None) -> None:
    """How far a model is that somebody waits for; None: nobody waits any longer."""
    with _lock:
        if text is None:
            _busy.pop(config, None)
        else:
            _busy[config] = text
    refresh()


def refresh() -> None:
    """Tell all tabs what has changed."""
    with _lock:
        for shown in _shown.values():
            _tell(shown, shown.text())


def _tell(shown: _Shown, text: str) -> None:
    if text != shown.sent:
        shown.sent, shown.number = text, next(_numbers)
        PromptServer.instance.send_sync(EVENT, shown.message())


def state_of(config: ModelConfig) -> str:
    """A model's state in a few words, as it is now."""
    group = find_group(config.group)
    model = None if group is None else group.models.get(config)
    if config in _busy:
        return _busy[config]
    if group is None or not group.usable:
        return "not running: the next run starts the workers"
    if group.state == "starting":
        return "still starting: the next run waits for the rest"
    if model is None:
        return "not loaded: the next run loads it"
    if not model.loaded:
        return "still loading: the next run waits for the rest"
    held = model.quantized()
    ready = f"ready: {where(config)}{f', {held}' if held else ''}"
    return "\n".join(filter(None, (ready, model.took(), model.loras())))


def where(config: ModelConfig) -> str:
    """Layout and devices of a model."""
    ranks = config.layout.world_size
    one, several = ("GPU", "GPUs") if config.devices.kind == "cuda" else ("CPU process", "CPU processes")
    text = f"{config.layout.name} on {ranks} {one if ranks == 1 else several}"
    return text + (f" of {config.hosts.count} hosts" if config.hosts.several else "")


def is_running() -> bool:
    """Whether ComfyUI is running a graph."""
    return bool(PromptServer.instance.prompt_queue.get_current_queue_volatile()[0])


def _greet() -> None:
    """Tell new tabs all that the others know."""
    server, now = PromptServer.instance, time.monotonic()
    for tab, connection in list(server.sockets.items()):
        if _tabs.get(tab, (None,))[0] is not connection:
            _tabs[tab] = connection, now + GREETING_SECONDS
    with _lock:
        for tab in [tab for tab, (_, until) in _tabs.items() if now < until]:
            for shown in _shown.values():
                server.send_sync(EVENT, shown.message(), tab)
    for tab in _tabs.keys() - server.sockets.keys():
        del _tabs[tab]


def _watch() -> None:
    while True:
        threading.Event().wait(LOOK_SECONDS)
        try:
            refresh()
            _greet()
        except Exception:
            log.exception("the state of the workers")
