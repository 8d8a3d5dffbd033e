"""Whether two hosts have the same checkpoint: a digest of what is in it, from little of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .pipeline_folder import files_of_folder

SAMPLES = 16
SAMPLE_BYTES = 1 << 16


def content_digest(path: Path) -> str:
    """Of a pipeline folder or a file: names, sizes, and samples of the content that are spread evenly.

    Times do not count, which copies do not keep. Weights that were trained further differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else files_of_folder(path):
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.relative_to(path)}|{size}\n".encode())
        with file.open("rb") as content:
            for sample in range(SAMPLES):
                content.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
