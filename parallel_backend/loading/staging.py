"""Reads ahead of what is moved: several threads fill a ring of buffers, which come out in the order of the jobs.

Where a GPU takes the bytes, buffers are page-locked, so that copies from them run beside everything else, and a buffer
is filled again once the copies from it are done. Host memory is that of the ring, whatever the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..limits import cores
from .file_reader import Buffer, Slice

MOST_THREADS = 12
"""Each copies 3 to 4 GB/s of rows out of the page cache. On a machine with an H100 and 16 cores, eight loaded 29 GB/s,
twelve 28 to 37, and fourteen to sixteen 24 to 35; they keep a disk's queue busy, too."""
THREADS = max(4, min(MOST_THREADS, cores() * 3 // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
"""Of this rank, which shares the cores with the others on its host."""
BUFFERS = THREADS + 4
"""Those that are being filled, and some that wait for their turn or are being copied from."""
BUFFER_BYTES = 16 * 2**20
"""Enough that a copy (0.3 ms) takes longer than starting it; all buffers are 256 MiB at most, soon page-locked."""


@dataclass(frozen=True)
class Job:
    """Something to read.

    Args:
        owner: what it is a part of; jobs of one owner come one after the other.
        part: where it is stored.
        first: element of the owner that it begins with.
        into: host memory (``uint8 [part.nbytes]``) that it goes straight into; None for a buffer of the ring.
    """

    owner: str
    part: Slice
    first: int = 0
    into: Tensor | None = None


class Ring:
    """Reads jobs ahead of their use.

    Args:
        jobs: taken one by one as there is room for them, so they may be made then.
        read: fills a buffer with a slice, in another thread; ValueError where it cannot.
        device: that the bytes are copied to, on its current stream.
    """

    def __init__(self, jobs: Iterable[Job], read: Callable[[Slice, Buffer], None], device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._jobs = iter(jobs)
        self._read = read
        self._device = device
        self._reading: deque[tuple[Job, _Place, Future[Tensor]]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, "read-weights", _use, (device,))

    def __enter__(self) -> Ring:
        for _ in range(BUFFERS):
            self._start(_Place(self._device))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def of(self, owner: str) -> Iterator[tuple[Job, Tensor]]:
        """The jobs of the owner whose turn it is, with their bytes (``uint8 [nbytes]``, on the host).

        Copies of the bytes have to be queued on the device's current stream before the next ones are asked for.

        Raises:
            ValueError: a job's; none is read after that, and no owner has any more.
        """
        while self._reading and self._reading[0][0].owner == owner:
            job, place, future = self._reading.popleft()
            try:
                data = future.result()
            except ValueError:
                self._jobs = iter(())
                for _, _, other in self._reading:
                    other.cancel()
                self._reading.clear()
                raise
            yield job, data
            place.release()
            self._start(place)

    def _start(self, place: _Place) -> None:
        job = next(self._jobs, None)
        if job is not None:
            self._reading.append((job, place, self._pool.submit(place.fill, job, self._read)))


class _Place:
    """One buffer of the ring, made when it is first needed and by the thread that fills it."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._buffer: Tensor | None = None

    def fill(self, job: Job, read: Callable[[Slice, Buffer], None]) -> Tensor:
        """Carry a job out; its bytes."""
        if job.into is not None:
            read(job.part, job.into.numpy())
            return job.into
        if self._copied is not None:
            self._copied.synchronize()
        if self._buffer is None or len(self._buffer) < job.part.nbytes:
            size = max(job.part.nbytes, BUFFER_BYTES)  # a row of columns can be longer
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._gpu is not None)
        data = self._buffer[: job.part.nbytes]
        read(job.part, data.numpy())
        return data

    def release(self) -> None:
        """Let the buffer be filled again, once what is queued on the device now is done."""
        if self._gpu is not None:
            if self._copied is None:
                self._copied = torch.cuda.Event(blocking=True)  # a waiting thread sleeps
            self._copied.record(torch.cuda.current_stream(self._gpu))


def _use(device: torch.device) -> None:
    """Have a new thread use the device: what it calls in CUDA would otherwise set up the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
