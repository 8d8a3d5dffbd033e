"""Whether two hosts have the same checkpoint: a digest of what is in it, from little of it."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .pipeline_folder import files_of_folder

SAMPLES = 16
SAMPLE_BYTES = 1 << 16


def content_digest(path: Path) -> str:
    """Of a pipeline folder or a file: names, sizes, and samples of the content that are spread evenly.

    Times do not count, which copies do not keep, nor whether something is a link. Weights that were trained further
    differ nearly everywhere.

    Raises:
        ValueError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else files_of_folder(path):
        try:
            with file.open("rb") as content:
                size = os.fstat(content.fileno()).st_size
                digest.update(os.fsencode(f"{'' if file == path else file.relative_to(path)}|{size}\n"))
                for sample in range(SAMPLES):
                    content.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(content.read(SAMPLE_BYTES))
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:16]


def open_same_checkpoint(path: Path, content: str, part: str = "") -> Checkpoint:
    """A checkpoint, with the content that it has on the first host, if there are others; ``part`` as of
    `open_checkpoint`.

    Raises:
        ValueError: it is not there, not whole, or another one; the text names the host.
    """
    if not content:
        return open_checkpoint(path, part)
    try:
        source = open_checkpoint(path, part)
    except ValueError as error:
        raise ValueError(
            f"on the host {socket.gethostname()}: {error}; checkpoints must be at the same path on all hosts"
        ) from None
    if content_digest(source.path) != content:
        raise ValueError(f"on the host {socket.gethostname()}, {path} is another checkpoint than on the first host")
    return source
