"""Clients in processes of their own, in surroundings of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 100
KNOWN = f"import sys; sys.path.insert(1, {str(ROOT)!r})"
ANOTHER_USER = 54321
"""No user of any machine; not root, and without a name or a home."""


def start_ranks(
    ranks: int = 1,
    *,
    environment: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
    python: Sequence[str] = (sys.executable,),
    folder: Path = ROOT,
    umask: int = -1,
    code: str = KNOWN,
    call: str = "",
) -> dict[str, Any]:
    """What `tests.runtime.start_ranks` says of a group that it has started and ended.

    Args:
        ranks: of the group.
        environment: variables that differ from this process's; None is unset.
        prefix: a command that runs another.
        python: the interpreter, with settings.
        folder: where it is started.
        umask: see `subprocess.Popen`.
        code: that makes the package and these tests known, and whatever else comes first.
        call: another function of that module than ``main``, with its arguments.
    """
    variables = os.environ | (environment or {})
    code += f"\nfrom tests.runtime.start_ranks import *; {call or f'main({ranks})'}"
    done = subprocess.run(
        [*prefix, *python, "-c", code],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        umask=umask,
    )
    lines = done.stdout.splitlines()
    assert lines, (done.returncode, done.stderr[-3000:])
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def as_another_user() -> list[str]:
    """A command that runs another one as a user who can write to nothing; tests without such a command are skipped.

    It can read everything, since where Python is may be closed to others.
    """
    able = "+dac_read_search"
    command = ["setpriv", f"--reuid={ANOTHER_USER}", f"--regid={ANOTHER_USER}", "--clear-groups"]
    return _checked([*command, f"--inh-caps={able}", f"--ambient-caps={able}", "--"])


def with_own(*what: str) -> list[str]:
    """A command that runs a shell script, which comes next, in namespaces of its own, such as ``--mount``."""
    return [*_checked(["unshare", *what, "--"]), "sh", "-ec"]


def _checked(command: list[str]) -> list[str]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    done = subprocess.run([*command, "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not permitted here: {' '.join(command)}: {done.stderr.strip()}")
    return command
