"""Faults inside real ranks, at named moments. The product has no code for it: it comes in with the ranks' environment.

A test writes an `Order` into a folder; the rank that it is for carries it out once, at its moment, and notes when.
`install` runs in every Python process that a server under test starts (see tests/comfyui/launch_server.py), before
anything else, and does nothing but in the fork server, of which ranks are forks. So this module imports only what
starting Python has imported anyway.
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
LEAK = "HYBRID_DIT_SOAK_LEAK"
"""Environment variable: KiB that rank 0 keeps of each picture, to see that the soak finds it."""
MESH_AXES = ("ulysses", "ring", "tp", "ring and ulysses", "all ranks")
"""Axes on which ranks exchange something tiny when a mesh is built; "mesh tp" is the moment before."""
ENGINE, WORKER = "parallel_backend.runtime.rank.engine", "parallel_backend.runtime.rank.worker"
IMPORTER = "parallel_backend.runtime.hosts.fork_server"
METHODS = ("load", "encode_text", "keep", "adapt", "predict", "end_run", "decode", "encode", "offload",
           "lend")  # fmt: skip
"""Moments that bear the name of what the engine is asked for."""
ALONE = {"vae_decode": ("VAEComponent", "decode"), "vae_encode": ("VAEComponent", "encode")}
"""Moments within work that rank 0 does alone, and the class and method that do it."""
COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather", "batch_isend_irecv", "broadcast")
EXCHANGES = ("spread_heads", "gather_heads", "shift", "all_reduce")
"""Those of `parallel_backend.parallel.exchange`, within blocks."""
START, RENDEZVOUS, COLLECTIVE, BETWEEN = "start", "rendezvous", "collective", "between"
IN_STEP = "in step"
"""A collective within an evaluation of the transformer."""
KINDS = ("kill", "raise", "oom", "exit", "stop", "sleep", "work", "cuda")
INJECTED = "a fault that was asked for"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Process 1 has 77.85 GiB memory in use."
)
CUDA_ERROR = "CUDA error: unspecified launch failure"
EXIT_CODE = 3


@dataclass(frozen=True)
class Order:
    """What is to happen, to which rank and when.

    Args:
        rank: who carries it out.
        moment: `START` (before the rank connects or has a log of its own), `RENDEZVOUS` (it has, and meets the others),
            one of `METHODS` or `ALONE`, ``mesh`` and one of `MESH_AXES`, `COLLECTIVE`, `IN_STEP`, or `BETWEEN` (it has
            evaluated the transformer and waits for what is next).
        kind: one of `KINDS`.
        nth: at which occurrence of the moment, counted from when the order is there.
        seconds: how long ``sleep``, or ``work``, takes at most; it ends when orders are withdrawn.
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

    def give(self, *orders: Order) -> None:
        """Have orders carried out, one a rank at most, in the place of any others."""
        self.withdraw()
        for order in orders:
            draft = self.folder / "draft"
            draft.write_text(json.dumps(asdict(order)))
            draft.rename(_order_file(self.folder, order.rank))

    def withdraw(self) -> None:
        """No order is to be carried out any more, not even to its end; forget when the last one was."""
        for file in (*self.folder.glob("order-*.json"), _done_file(self.folder)):
            file.unlink(missing_ok=True)

    def carried_out(self) -> float | None:
        """When an order was carried out (`time.time`), the last if there were several; None if none has been."""
        try:
            return float(_done_file(self.folder).read_text())
        except (FileNotFoundError, ValueError):  # ValueError: just being written
            return None


def _order_file(folder: Path, rank: int) -> Path:
    return folder / f"order-{rank}.json"


def _done_file(folder: Path) -> Path:
    return folder / "done"


# --- in a rank -------------------------------------------------------------------------------------------------------


class _Rank:
    """Carries out orders in this process, once it is a rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._counted: tuple[str, int] = ("", 0)
        self._latest = ""
        self._leak = 1024 * int(os.environ.get(LEAK, "0"))
        self._leaked: list[bytes] = []

    def reached(self, moment: str) -> None:
        """A moment has come: carry out what is ordered for it."""
        if moment in METHODS:
            self._latest = moment
        rank = int(os.environ["RANK"])
        if self._leak and moment == "decode" and rank == 0:
            self._leaked.append(b"x" * self._leak)
        try:
            text = _order_file(self.folder, rank).read_text()
        except FileNotFoundError:
            return
        order = Order(**json.loads(text))
        if moment == COLLECTIVE and order.moment == IN_STEP and self._latest == "predict":
            moment = IN_STEP
        if order.moment != moment or (moment == BETWEEN and self._latest != "predict"):
            return
        count = self._counted[1] + 1 if self._counted[0] == text else 1
        self._counted = (text, count)
        if count < order.nth:
            return
        _order_file(self.folder, rank).unlink()
        self._counted = ("", 0)
        _done_file(self.folder).write_text(repr(time.time()))
        _carry_out(order, self.folder)


def _carry_out(order: Order, folder: Path) -> None:
    if order.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif order.kind == "exit":
        os._exit(EXIT_CODE)
    elif order.kind in ("sleep", "work"):
        until = time.monotonic() + order.seconds
        while time.monotonic() < until and _done_file(folder).exists():
            time.sleep(0.02 if order.kind == "sleep" else 0.0)
    elif order.kind == "oom":
        import torch

        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    elif order.kind == "cuda":
        import torch

        raise torch.AcceleratorError(CUDA_ERROR)
    else:
        raise RuntimeError(INJECTED)


class _Loader(importlib.abc.Loader):
    """The engine's module, with its methods and the collectives announced to a rank; the worker's, with its start."""

    def __init__(self, loader: importlib.abc.Loader, rank: _Rank) -> None:
        self.loader, self.rank = loader, rank

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        self.loader.exec_module(module)
        if module.__name__ == WORKER:
            module.main = self._announced(module.main, START)
            return
        import torch.distributed as dist

        from parallel_backend.parallel import exchange
        from parallel_backend.runtime.rank import mesh_check
        from parallel_backend.runtime.wire.channel import Channel

        for name in METHODS:
            setattr(module.Engine, name, self._announced(getattr(module.Engine, name), name))
        for moment, (part, name) in ALONE.items():
            of = getattr(module, part)
            setattr(of, name, self._announced(getattr(of, name), moment))
        for name in COLLECTIVES:
            setattr(dist, name, self._announced(getattr(dist, name), COLLECTIVE))
        for name in EXCHANGES:
            setattr(exchange, name, self._announced(getattr(exchange, name), COLLECTIVE))
        dist.init_process_group = self._announced(dist.init_process_group, RENDEZVOUS)
        mesh_check.reached = lambda axis: self.rank.reached(f"mesh {axis}")
        Channel.receive = self._announced(Channel.receive, BETWEEN)

    def _announced(self, function, moment: str):
        def announced(*args, **kwargs):
            self.rank.reached(moment)
            return function(*args, **kwargs)

        return announced


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, rank: _Rank) -> None:
        self.rank = rank

    def find_spec(self, fullname, path, target=None):
        if fullname not in (ENGINE, WORKER):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.rank)
        return spec


def install() -> None:
    """In the fork server of a server whose environment asks for it: have its ranks take orders."""
    folder = os.environ.get(FOLDER)
    if folder and IMPORTER in sys.orig_argv:
        sys.meta_path.insert(0, _Finder(_Rank(Path(folder))))
