"""Reads slices of stored tensors: a run of rows straight from the file, columns of rows through a mapping of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .safetensors_reader import DTYPES, StoredTensor, read_header

Buffer = npt.NDArray[np.uint8]
Ranges = tuple[tuple[int, int], ...]
"""Half-open."""
POPULATE_READ = 22
"""MADV_POPULATE_READ: bring pages in, with an error where that fails, not a SIGBUS. Linux 5.14 and newer know it."""
UNMAPPED_BYTES = 4 * 2**20
"""Of whole rows at a time, where they are read rather than mapped."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True)
class Slice:
    """Bytes of a stored tensor: a run of them, or of each row in that run some columns.

    Args:
        tensor: which.
        start, stop: the run, in bytes from the tensor's first.
        row_bytes: of a whole row; the run is made of such where columns are given.
        columns: ranges of bytes within a row, which are put side by side; empty for all of the run.
    """

    tensor: StoredTensor
    start: int
    stop: int
    row_bytes: int = 0
    columns: tuple[tuple[int, int], ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the slice."""
        run = self.stop - self.start
        return run // self.row_bytes * sum(b - a for a, b in self.columns) if self.columns else run


def runs(tensor: StoredTensor, outer: Ranges, row_bytes: int, inner: Ranges, buffer_bytes: int) -> Iterator[Slice]:
    """Ranges of a tensor's rows, in slices of a buffer's size at most. (A row of columns is not cut further.)

    Args:
        tensor: which.
        outer: ranges of rows.
        row_bytes: of a row.
        inner: ranges of bytes of each row; empty for all.
        buffer_bytes: of a buffer.
    """
    step = max(1, buffer_bytes // 16 * 16)  # of a run, whose parts may end within a row, but not within a number
    if inner:
        step = max(1, buffer_bytes // max(1, sum(b - a for a, b in inner))) * row_bytes
    for first, end in outer:
        for at in range(first * row_bytes, end * row_bytes, max(1, step)):
            yield Slice(tensor, at, min(at + step, end * row_bytes), row_bytes, inner)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in their order, without empty ones, and those that follow each other as one."""
    found: list[tuple[int, int]] = []
    for first, end in ranges:
        if first < end and found and found[-1][1] == first:
            found[-1] = found[-1][0], end
        elif first < end:
            found.append((first, end))
    return tuple(found)


class FileReader:
    """Open weight files. Several threads may read at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, tuple[int, dict[str, StoredTensor]]] = {}
        self._errors: dict[Path, str] = {}

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files; no thread may be reading."""
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, part: Slice, into: Buffer) -> None:
        """Fill ``into`` (as many bytes as the slice has) with a slice.

        Raises:
            ValueError: the file cannot be read, is shorter than it was or another one; names file and key.
        """
        assert into.nbytes == part.nbytes
        tensor = part.tensor
        try:
            descriptor = self._open(tensor)
            if not into.nbytes:
                return
            if part.columns:
                self._read_columns(descriptor, part, into)
            else:
                self._read_run(descriptor, tensor.offset + part.start, into)
        except (OSError, ValueError) as error:
            raise ValueError(f"{tensor.key} in {tensor.file} cannot be read: {_reason(error)}") from error

    def whole(self, tensor: StoredTensor) -> torch.Tensor:
        """All of a tensor, in its shape.

        Raises:
            ValueError: as `read`, or it has a dtype that is not read.
        """
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.key} in {tensor.file} is stored as {tensor.dtype}, which is not read")
        buffer = np.empty(tensor.nbytes, np.uint8)
        self.read(Slice(tensor, 0, tensor.nbytes), buffer)
        return torch.from_numpy(buffer).view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def scalar(self, tensor: StoredTensor) -> float:
        """The value of a tensor of one element; ValueError as `whole`."""
        return float(self.whole(tensor).item())

    def _open(self, tensor: StoredTensor) -> int:
        """A descriptor of the tensor's file, which is still the one that the tensor was found in."""
        file = tensor.file
        with self._lock:
            if file not in self._files and file not in self._errors:
                try:
                    self._files[file] = self._open_file(file)
                except (OSError, ValueError) as error:
                    self._errors[file] = _reason(error)
            if file in self._errors:
                raise ValueError(self._errors[file])
            descriptor, header = self._files[file]
        if header.get(tensor.key) != tensor:
            raise ValueError("the file was replaced while the model was being loaded; load it again")
        return descriptor

    @staticmethod
    def _open_file(file: Path) -> tuple[int, dict[str, StoredTensor]]:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Reads are large and say all that they want: what lies behind a slice is another rank's.
            with contextlib.suppress(OSError):  # not every file system takes advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            return descriptor, read_header(file)
        except BaseException:
            os.close(descriptor)
            raise

    def _read_run(self, descriptor: int, offset: int, into: Buffer) -> None:
        done, view = 0, into.data
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if not count:
                raise ValueError(f"the file ends at byte {offset + done}: it was cut off while the model was loaded")
            done += count

    def _read_columns(self, descriptor: int, part: Slice, into: Buffer) -> None:
        """Copy from a mapping: a call for each row would cost more than its bytes do, and whole rows are more to copy.

        A disk gives whole rows (small reads of the columns alone take longer), which neighbouring ranks want anyway.
        """
        first = part.tensor.offset + part.start
        count = (part.stop - part.start) // part.row_bytes
        out = into.reshape(count, -1)
        base = first - first % mmap.ALLOCATIONGRANULARITY
        length = first + part.stop - part.start - base
        try:
            # Beyond the file's end this is a ValueError. It is unmapped when its last view goes, which is here.
            mapping = mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=base)
            mapping.madvise(mmap.MADV_SEQUENTIAL)
            pages = np.frombuffer(mapping, np.uint8)
            _populate(pages)
        except OSError:
            # Some network disks map nothing. Where the disk fails, or the file was cut off, reading says so.
            step = max(1, UNMAPPED_BYTES // part.row_bytes)
            for row in range(0, count, step):
                rows = np.empty((min(step, count - row), part.row_bytes), np.uint8)
                self._read_run(descriptor, first + row * part.row_bytes, rows.reshape(-1))
                _take_columns(rows, part.columns, out[row : row + step])
            return
        _take_columns(pages[first - base :].reshape(count, -1), part.columns, out)


def _take_columns(rows: Buffer, columns: tuple[tuple[int, int], ...], out: Buffer) -> None:
    """Put ranges of columns of rows side by side."""
    place = 0
    for start, stop in columns:
        out[:, place : place + stop - start] = rows[:, start:stop]  # numpy lets other threads go on
        place += stop - start


def _populate(pages: Buffer) -> None:
    """Bring a mapping's pages in; OSError where the disk fails or the file has become shorter."""
    # Not Python's own madvise: that one keeps all other threads waiting, here for a disk.
    if _libc.madvise(pages.ctypes.data, pages.nbytes, POPULATE_READ):
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # an older kernel, which brings pages in as they are touched
            raise OSError(code, f"it was cut off while the model was loaded, or the disk fails ({os.strerror(code)})")


def _reason(error: OSError | ValueError) -> str:
    return str((isinstance(error, OSError) and error.strerror) or error)
