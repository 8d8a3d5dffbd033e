"""GPUs that failed for good while this process ran, such as by falling off the bus; ``auto`` leaves them out."""

from __future__ import annotations

import logging
import re
import subprocess

from .visible_gpus import gpu_names

log = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
"""How long nvidia-smi may take to answer for a GPU; one that is gone may hold it up."""
_GONE = re.compile(
    r"fallen off the bus|GPU is lost|uncorrectable ECC|hardware stack error|contained memory error"
    r"|no CUDA-capable device is detected|No CUDA GPUs are available|invalid device ordinal",
    re.IGNORECASE,
)
"""What CUDA says of a device itself."""
_UNCLEAR = re.compile(
    r"unspecified launch failure|unknown error|driver shutting down|not initiali[sz]ed", re.IGNORECASE
)
"""What it says of one that is gone as well as of a kernel that went wrong."""
_lost: dict[str, str] = {}


def lose(name: str, error: str) -> bool:
    """Have ``auto`` leave a GPU out from now on, if an error of CUDA means that it, and not a program, is at fault.

    Where the error may mean either, nvidia-smi is asked.

    Args:
        name: its entry in CUDA_VISIBLE_DEVICES, or its number.
        error: what CUDA said.

    Returns:
        Whether it is left out.
    """
    if name not in _lost and (_GONE.search(error) or (_UNCLEAR.search(error) and not answers(name))):
        _lost[name] = error
        log.warning("GPU %s is left out of 'auto' until this process is started again: %s", name, error)
    return name in _lost


def answers(name: str) -> bool:
    """Whether nvidia-smi finds a GPU well, or is not there to be asked.

    Args:
        name: see `lose`.
    """
    try:
        query = ["nvidia-smi", "-i", name, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    except OSError:
        return True
    return done.returncode == 0 and "lost" not in done.stdout.lower()


def working_gpus(count: int) -> list[int]:
    """The numbers of the GPUs that this process sees, but for those that are left out."""
    return [index for index, name in enumerate(gpu_names(count)) if name not in _lost]


def left_out(count: int) -> str:
    """A remark on those of so many GPUs that are left out; empty where there are none."""
    lost = [str(index) for index, name in enumerate(gpu_names(count)) if name in _lost]
    return f" (GPU {', '.join(lost)} failed and is left out)" if lost else ""
