"""Faults inside real ranks, at named moments. The product has no code for it: it comes in with the ranks' environment.

A test writes an `Order` into a folder; the rank that it is for carries it out once, at its moment, and notes when.
`install` runs in every Python process that a server under test starts (see tests/comfyui/launch_server.py), before
anything else, and does nothing but in ranks. So this module imports only what starting Python has imported anyway.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "HYBRID_DIT_TEST_FAULTS"
"""Environment variable: the folder of orders; without it nothing is done."""
ENGINE, WORKER = "parallel_backend.runtime.engine", "parallel_backend.runtime.worker"
METHODS = ("load", "encode_text", "keep", "predict", "end_run", "decode", "encode", "offload")
"""Moments that bear the name of what the engine is asked for."""
COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather", "batch_isend_irecv", "broadcast")
START, COLLECTIVE = "start", "collective"
KINDS = ("kill", "raise", "oom", "exit", "stop", "sleep")
INJECTED = "a fault that was asked for"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Process 1 has 77.85 GiB memory in use."
)
EXIT_CODE = 3


@dataclass(frozen=True)
class Order:
    """What is to happen, to which rank and when.

    Args:
        rank: who carries it out.
        moment: `START` (before the rank connects), one of `METHODS`, or `COLLECTIVE`.
        kind: one of `KINDS`.
        nth: at which occurrence of the moment, counted from when the order is there.
        seconds: how long ``sleep`` takes.
    """

    rank: int
    moment: str
    kind: str
    nth: int = 1
    seconds: float = 0.0


class Orders:
    """The test's side of the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def give(self, order: Order) -> None:
        """Have an order carried out, in the place of any other."""
        self.withdraw()
        draft = self.folder / "draft"
        draft.write_text(json.dumps(asdict(order)))
        draft.rename(_order_file(self.folder))

    def withdraw(self) -> None:
        """No order is to be carried out any more; forget when the last one was."""
        for file in (_order_file(self.folder), _done_file(self.folder)):
            file.unlink(missing_ok=True)

    def carried_out(self) -> float | None:
        """When the order was carried out (`time.time`), or None if it has not been."""
        try:
            return float(_done_file(self.folder).read_text())
        except (FileNotFoundError, ValueError):  # ValueError: just being written
            return None


def _order_file(folder: Path) -> Path:
    return folder / "order.json"


def _done_file(folder: Path) -> Path:
    return folder / "done"


# --- in a rank -------------------------------------------------------------------------------------------------------


class _Rank:
    """Carries out orders in this process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._counted: tuple[str, int] = ("", 0)

    def reached(self, moment: str) -> None:
        """A moment has come: carry out what is ordered for it."""
        try:
            text = _order_file(self.folder).read_text()
        except FileNotFoundError:
            return
        order = Order(**json.loads(text))
        if (order.rank, order.moment) != (self.rank, moment):
            return
        count = self._counted[1] + 1 if self._counted[0] == text else 1
        self._counted = (text, count)
        if count < order.nth:
            return
        _order_file(self.folder).unlink()
        self._counted = ("", 0)
        _done_file(self.folder).write_text(repr(time.time()))
        _carry_out(order)


def _carry_out(order: Order) -> None:
    if order.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif order.kind == "exit":
        os._exit(EXIT_CODE)
    elif order.kind == "sleep":
        time.sleep(order.seconds)
    elif order.kind == "oom":
        import torch

        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    else:
        raise RuntimeError(INJECTED)


class _Loader(importlib.abc.Loader):
    """The engine's module, with its methods and the collectives announced to a rank."""

    def __init__(self, loader: importlib.abc.Loader, rank: _Rank) -> None:
        self.loader, self.rank = loader, rank

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        import torch.distributed as dist

        for name in METHODS:
            setattr(module.Engine, name, self._announced(getattr(module.Engine, name), name))
        for name in COLLECTIVES:
            setattr(dist, name, self._announced(getattr(dist, name), COLLECTIVE))

    def _announced(self, function, moment: str):
        def announced(*args, **kwargs):
            self.rank.reached(moment)
            return function(*args, **kwargs)

        return announced


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, rank: _Rank) -> None:
        self.rank = rank

    def find_spec(self, fullname, path, target=None):
        if fullname != ENGINE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.rank)
        return spec


def install() -> None:
    """In a rank of a server whose environment asks for it: take orders."""
    folder = os.environ.get(FOLDER)
    if not folder or WORKER not in sys.orig_argv or "RANK" not in os.environ:
        return
    rank = _Rank(Path(folder), int(os.environ["RANK"]))
    sys.meta_path.insert(0, _Finder(rank))
    rank.reached(START)
