"""A checkpoint with transformer, text encoder and VAE in one safetensors file, as ComfyUI's Load Checkpoint reads it.

ComfyUI's CheckpointSave writes ``model.diffusion_model.*``, ``text_encoders.NAME.transformer.*`` (NAME is what ComfyUI
calls the text encoder), beside those the tokenizer's tensors, ``text_encoders.*``, and ``vae.*``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .config_files import blamed
from .file_reader import FileReader
from .safetensors_reader import StoredTensor, read_header
from .single_file import SingleFile, open_single_file, transformer_in

TEXT_ENCODERS, VAE = "text_encoders.", "vae."
_NOT_USED = ("logit_scale",)
"""Beside a text encoder's transformer: what ComfyUI writes of its class for all of them, and reads of none of these."""


@dataclass(frozen=True)
class AllInOne:
    """What is in such a file.

    Args:
        path: of the file.
        transformer: checked.
        prefix: before the transformer's keys.
        text_prefix: before the keys of the text encoder, if it is the one that the workers hold for this family.
        stored: all tensors.
    """

    path: Path
    transformer: SingleFile
    prefix: str
    text_prefix: str
    stored: Mapping[str, StoredTensor]

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with a prefix."""
        return [key for key in self.stored if key.startswith(prefix)]

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors on the CPU, as they are stored; ValueError where one cannot be read."""
        with FileReader() as reader:
            return {key: reader.whole(self.stored[key]) for key in keys}


def open_all_in_one(path: Path) -> AllInOne:
    """Look at a checkpoint's header; of its parts the transformer is checked.

    Raises:
        ValueError: as `open_single_file`, or there is something in it that belongs to none of the parts.
    """
    transformer = open_single_file(path)
    path, title = transformer.path, transformer.family.title
    stored = read_header(path)
    _, prefix = transformer_in(stored)
    left = [key for key in stored if not key.startswith((prefix, TEXT_ENCODERS, VAE))]
    kind, text_prefix = transformer.family.text_encoder, ""
    names = text_encoder_names(stored)
    if kind is not None and any(kind.is_file(text_encoder_keys(stored, name)[0]) for name in names):
        with blamed(path):
            text_prefix = text_encoder_keys(stored)[1]
        beside = [key for key in stored if key.startswith(TEXT_ENCODERS) and not key.startswith(text_prefix)]
        known = {text_prefix.removesuffix("transformer.") + name for name in _NOT_USED}
        left += [key for key in beside if key not in known | {f"{TEXT_ENCODERS}{kind.file_tokenizer}"}]
    if left:
        some = ", ".join(sorted(left)[:3]) + (", ..." if len(left) > 3 else "")
        raise ValueError(
            f"{some} in {path}: a checkpoint of {title} has no place for {len(left)} tensor(s) of it, only for "
            f"{prefix}*, {text_prefix or TEXT_ENCODERS}* and {VAE}*; take its models from files of their own"
        )
    return AllInOne(path, transformer, prefix, text_prefix, stored)


def text_encoder_names(stored: Iterable[str]) -> list[str]:
    """What ComfyUI calls the text encoders in a checkpoint with these keys."""
    inside = (key.removeprefix(TEXT_ENCODERS).split(".", 2) for key in stored if key.startswith(TEXT_ENCODERS))
    return sorted({parts[0] for parts in inside if len(parts) == 3 and parts[1] == "transformer"})


def text_encoder_keys(stored: Mapping[str, StoredTensor], name: str = "") -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a checkpoint's text encoder by the keys that they have in a file of its own, and their prefix.

    Args:
        stored: all of the checkpoint's.
        name: which text encoder; without it, the only one.

    Raises:
        ValueError: there is none, or there are several.
    """
    if not name:
        names = text_encoder_names(stored)
        if len(names) != 1:
            found = f"{len(names)} text encoders ({', '.join(names)})" if names else "no text encoder"
            raise ValueError(f"the checkpoint has {found} under {TEXT_ENCODERS}*, where one is expected")
        (name,) = names
    prefix = f"{TEXT_ENCODERS}{name}.transformer."
    keys = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
    beside = {
        key.removeprefix(TEXT_ENCODERS): tensor for key, tensor in stored.items() if key.startswith(TEXT_ENCODERS)
    }
    return keys | {key: tensor for key, tensor in beside.items() if "." not in key}, prefix
