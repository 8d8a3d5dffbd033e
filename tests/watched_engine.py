"""A rank's engine whose components a test looks at."""

from __future__ import annotations

import pytest

from parallel_backend.runtime.rank.component import Component
from parallel_backend.runtime.rank.engine import Engine
from parallel_backend.runtime.rank.eviction import Eviction


def watched_engine(room: Eviction, parts: list[Component], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """A rank's engine on the CPU that adds the components of whatever it loads to ``parts``."""
    engine = Engine(room.device, room.notify, room)
    build = engine._build

    def watched(*args):
        model = build(*args)
        parts.extend(model.components.values())
        return model

    monkeypatch.setattr(engine, "_build", watched)
    return engine
