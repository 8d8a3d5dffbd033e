"""The command line: one module a subcommand, found here by name."""

from __future__ import annotations

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "demo": "draw a picture with a small FLUX.2 on any layout, with no GPU and no download",
    "generate": "draw a picture with a model of any family, from a prompt and reference images",
    "worker": "make this machine one of the hosts of a group that runs over several",
    "doctor": "say what this machine can run, and what to change",
    "bench": "time a step at a model's true shape with random weights, on real ranks or on rank 0 alone",
    "families": "say which models are supported, how they can be split, and what checkpoints they come in",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status. Wrong input prints one line and gives 2."""
    parser = argparse.ArgumentParser(prog="python -m parallel_backend", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, summary in COMMANDS.items():
        modules[name] = importlib.import_module(f".{name}", __name__)
        modules[name].add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return modules[parsed.command].run(parsed)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__.partition(".")[0]):
            raise
        print(f"{parser.prog} {parsed.command}: {missing_package(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{parser.prog} {parsed.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{parser.prog} {parsed.command} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def missing_package(error: ModuleNotFoundError) -> str:
    """What is missing, in which Python, and two ways out."""
    checkout = Path(__file__).resolve().parents[2]
    python = checkout / ".venv" / "bin" / "python"
    there = f"run it with {python}, or " if python.is_file() and Path(sys.executable) != python else ""
    script = checkout / "install.py"
    what = shlex.quote(str(checkout)) if script.is_file() else "hybrid-dit"
    of_comfyui = f" (if it is ComfyUI's: {sys.executable} {shlex.quote(str(script))})" if script.is_file() else ""
    return (
        f"the Python that runs this ({sys.executable}) has no package {error.name!r}; {there}install what is needed: "
        f"{sys.executable} -m pip install {what}{of_comfyui}"
    )
