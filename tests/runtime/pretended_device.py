"""Test hooks: ranks on the CPU believe that their weights are on a device, whose memory they can lend.

`install` runs in every Python process whose ``sitecustomize`` calls it, as the fork server's, of which ranks are forks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import weakref
from types import ModuleType
from typing import Any

COMPONENT, EVICTION = "parallel_backend.runtime.rank.component", "parallel_backend.runtime.rank.eviction"
_parts: weakref.WeakSet[Any] = weakref.WeakSet()


def _held() -> int:
    """Bytes of the device that weights take."""
    return sum(part.nbytes - part.lent_bytes for part in _parts if part.place.name == "DEVICE")


def _note_parts(module: ModuleType) -> None:
    build = module.Component.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        _parts.add(self)

    module.Component.__init__ = init


def _count_them(module: ModuleType) -> None:
    build = module.Eviction.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.held = _held

    module.Eviction.__init__ = init


CHANGES = {COMPONENT: _note_parts, EVICTION: _count_them}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        CHANGES[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    sys.meta_path.insert(0, _Finder())
