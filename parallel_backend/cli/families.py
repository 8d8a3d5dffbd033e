"""``families``: which models are supported, how they can be split, and what checkpoints they come in."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..planning.support import FamilySupport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--markdown", action="store_true", help="print the table that docs/models.md has")
    form.add_argument("--fits", action="store_true", help="print which layout fits which GPUs, the table of README.md")


def run(args: argparse.Namespace) -> int:
    """Print what is supported; exit status 0."""
    # torch and diffusers are imported here, so that other subcommands start without them.
    from ..planning.support import support

    if args.fits:
        from ..planning.fits import fits_table

        print(fits_table())
        return 0
    found = support()
    if args.json:
        found["families"] = {name: asdict(family) for name, family in found["families"].items()}
        print(json.dumps(found, indent=2))
    else:
        print((render_markdown if args.markdown else render_text)(**found))
    return 0


def render_markdown(families: Mapping[str, FamilySupport], files: Mapping[str, tuple[str, ...]]) -> str:
    """A table with a column a family, and a line on files."""
    columns = list(families.values())
    rows = [[""] + [family.title for family in columns]]
    labels = [label for label, _ in _lines(columns[0])]
    cells = [dict(_lines(family)) for family in columns]
    rows += [[label] + [column[label] for column in cells] for label in labels]
    table = [f"| {' | '.join(row)} |" for row in rows]
    table.insert(1, "|" + "---|" * (len(columns) + 1))
    return "\n".join([*table, "", f"{_file_line(files)}."])


def render_text(families: Mapping[str, FamilySupport], files: Mapping[str, tuple[str, ...]]) -> str:
    """One section a family."""
    parts = []
    for family in families.values():
        lines = [f"{family.title} (--model {family.name})"]
        lines += [f"  {label:50}{value.replace('`', '')}" for label, value in _lines(family)]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _file_line(files).replace("`", "")])


def _lines(family: FamilySupport) -> list[tuple[str, str]]:
    """Label and value of each thing that is told of a family; labels are the same for all."""
    from ..planning.support import DEGREES

    degrees = " / ".join(map(str, DEGREES))
    text = f"`{family.text_encoder}`, sharded over {family.text_ranks} of {family.ranks} ranks"
    text = text if family.text_encoder else "ComfyUI's own"
    if family.transformer_alone:
        text += f"; ComfyUI's own for {_list(family.transformer_alone)}"
    kinds = ["diffusers folder"] if family.pipelines else []
    kinds += ["transformer file", *([f"text encoder file: {family.text_file}"] if family.text_file else [])]
    kinds += [f"VAE file: {family.vae_file}"] if family.vae_file else []
    vae = f"`{family.vae}`, {'on all ranks, a part of each frame' if family.vae_on_all else 'whole on rank 0'}"
    rings = "any" if len(family.ring) == family.ranks else _list(family.ring)
    return [
        ("models", _list(family.models)),
        ("pipelines", _list(f"`{name}`" for name in family.pipelines) or "none"),
        ("transformer", f"`{family.transformer}`, {family.heads} heads"),
        (f"Ulysses x TP, up to {family.ranks} ranks", _list(n for n in family.ulysses if n in family.tp)),
        ("Ring", rings),
        ("held by several ranks, at the highest TP", _copies(family.copies["transformer"])),
        ("text encoder", text),
        ("held by several ranks of these", _copies(family.copies.get("text_encoder", {})) or "-"),
        ("images in prompts", "vision tower, whole on rank 0" if family.vision_tower else "no"),
        ("reference images", _list(family.reference_methods) or "no"),
        ("VAE", vae if family.vae else "ComfyUI's own"),
        ("block cache", ", then ".join(f"{count} `{name}`" for name, count in family.blocks.items())),
        ("checkpoints", "; ".join(kinds)),
        (f"GiB a rank, bf16: transformer, TP {degrees}", _slashed(family.transformer_gib, DEGREES)),
        (f"text encoder, on {degrees} ranks", _slashed(family.text_encoder_gib, DEGREES)),
    ]


def _file_line(files: Mapping[str, tuple[str, ...]]) -> str:
    return (
        f"Single files: {_list(files['dtypes'])}, and {_list(files['fp8_dtypes'])} plain or with a scale a tensor or "
        f"a row ({_list(f'`{name}`' for name in files['fp8_scales'])}); with comfy-kitchen also "
        f"{_list(f'`{name}`' for name in files['quantized'])}"
    )


def _copies(found: Mapping[str, int]) -> str:
    by_number: dict[int, list[str]] = {}
    for name, number in found.items():
        if leaf := _leaf(name):
            by_number.setdefault(number, []).append(leaf)
    return "; ".join(f"on {number}: {_list(dict.fromkeys(names))}" for number, names in sorted(by_number.items()))


def _leaf(name: str) -> str:
    """The last part of a module's name that does not start with a number; empty for the model itself."""
    return [part for part in name.split(".") if not re.match(r"\d|\*", part)][-1]


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def _slashed(values: Mapping[int, float], degrees: Sequence[int]) -> str:
    """A number for each degree, where there is one."""
    return " / ".join(f"{values[n]:.1f}" if n in values else "-" for n in degrees) if values else "-"
