"""One world of 8 gloo ranks that lives for the whole pytest session; tests run functions on sub-meshes of it."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

RANKS = 8
PRELOAD = ["parallel_backend.parallelize", "transformers.models.mistral3.modeling_mistral3", "tests.distributed.world"]


class World:
    """Ranks that wait for functions. Starting them costs one import of torch and diffusers, not eight."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="world-")
        rendezvous = os.path.join(self._folder.name, "rendezvous")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, rendezvous), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], layout: Any, *args: Any, timeout: float = 60, **kwargs: Any) -> list:
        """Call ``function(mesh, layout, *args, **kwargs)`` on the first ``layout.world_size`` ranks; their results.

        The function must be importable by name. Every rank helps to build the sub-mesh, the others then wait.
        """
        for pipe in self._pipes:
            pipe.send((function, layout, args, kwargs))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < RANKS and time.monotonic() < deadline:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, max(0.0, deadline - time.monotonic())):
                rank = self._pipes.index(pipe)
                answers[rank] = pipe.recv()
                if not answers[rank][0]:
                    # The others may wait for this one for ever.
                    deadline = min(deadline, time.monotonic() + 5)
        errors = [f"rank {rank}: {payload}" for rank, (good, payload) in sorted(answers.items()) if not good]
        errors += [f"rank {rank} gave no answer" for rank in range(RANKS) if rank not in answers]
        if errors:
            self.close()
            self._start()
            raise AssertionError("\n".join(errors))
        return [_unpack(answers[rank][1]) for rank in range(layout.world_size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(rank: int, pipe: Connection, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist

    from parallel_backend.mesh import ParallelMesh, single_mesh

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(RANKS)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    meshes: dict[Any, ParallelMesh | None] = {}
    while True:
        try:
            function, layout, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            shape = (layout.ring_size, layout.ulysses_size, layout.tp_size)
            result = None
            if layout.world_size == 1:
                mesh = single_mesh("cpu")
            else:
                if shape not in meshes:
                    meshes[shape] = ParallelMesh.create(torch.arange(layout.world_size).view(shape), "cpu")
                mesh = meshes[shape]
            if rank < layout.world_size:
                result = function(mesh, layout, *args, **kwargs)
            pipe.send((True, _pack(result)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _pack(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(payload: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(payload), weights_only=False)
