"""LoRA files as ComfyUI and diffusers (peft) write them, for use without ComfyUI: which weights they change, and how.

A file names layers by the names of the model's own single file or of diffusers' class, in several spellings. What it
changes is stated as `Patch` of the single file's weights, as ComfyUI's loaders do, also for a pipeline folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import Transformer
from .adapters import NO_ADAPTERS, AdapterSet, Patch
from .config_files import blamed, parse_object, read_object
from .file_reader import FileReader
from .safetensors_reader import WEIGHT_DTYPES, StoredTensor, read_header, read_metadata
from .single_file import check_suffix

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""What may stand before a layer's name, also several of them."""
PLAIN_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What stands before names whose dots are underscores."""
_TENSOR = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<side>up|down)\.weight"
    r"|\.lora_(?P<letter>[AB])(?:(?:\.\w+)?\.weight)?"
    r"|\.(?P<part>alpha|dora_scale|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|diff|diff_b))"
)
"""A tensor's name: of a layer, and what of it. The word that may stand before ``.weight`` is an adapter's, in peft."""
_SIDES = {"up": "up", "down": "down", "B": "up", "A": "down"}
_REFUSED = {
    r"\.(lora_mid\.weight|hada_t[12]|lokr_t2)": "an adapter of a convolution",
    r"\.([ab][12]\.weight|oft_blocks|oft_diag|oft_R\..*)": "GLoRA or OFT",
    r"\.lora_magnitude_vector(\.\w+)*": "DoRA as peft has it",
    r"\.(reshape_weight|set_weight|w_norm|b_norm)": "a change of a weight's size, or another weight in its place",
}
"""Ends of names -> what they belong to, which is not read here."""
PEFT_METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"
"""Where diffusers has peft's configuration (in the file), and peft (beside it)."""


@dataclass(frozen=True)
class Place:
    """Where a layer of a LoRA file is in the single file's weights; see `Patch`."""

    key: str
    offset: tuple[int, int, int] | None = None
    swap: bool = False


class Layers:
    """The names that a LoRA file may call the weights of a transformer.

    Args:
        kind: what it is.
        config: of diffusers' class.
    """

    def __init__(self, kind: Transformer, config: Mapping[str, Any]) -> None:
        self.title = kind.title
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the single file's weights."""
        self._places: dict[str, Place] = {}
        for name, parameter in kind.build(config).named_parameters():
            parts = kind.file_rows(name)
            height = parameter.shape[0] // len(parts) if parameter.ndim else 1
            key, number, count = parts[0]
            self.shapes[key] = (height * count, *parameter.shape[1:])
            self._places[key] = Place(key)
            if len(parts) > 1:
                assert parts == ((key, 1, 2), (key, 0, 2)), name
                self._places[name] = Place(key, swap=True)
            elif count > 1:
                self._places[name] = Place(key, (0, number * height, height))
            else:
                self._places[name] = Place(key)
        self._plain = {name.replace(".", "_"): place for name, place in self._places.items()}

    def find(self, layer: str, leaf: str) -> Place | None:
        """Where the weight or bias of a layer is; None if the model has none of that name."""
        for prefix in PLAIN_PREFIXES:
            if layer.startswith(prefix):
                return self._plain.get(f"{layer[len(prefix) :]}_{leaf}")
        while True:
            place = self._places.get(f"{layer}.{leaf}") or self._places.get(layer)
            prefix = next((one for one in PREFIXES if layer.startswith(one)), "")
            if place is not None or not prefix:
                return place
            layer = layer[len(prefix) :]


def read_loras(kind: Transformer, config: Mapping[str, Any], loras: Sequence[tuple[str | Path, float]]) -> AdapterSet:
    """The patches of several LoRA files on one transformer, in order.

    Args:
        kind, config: of the transformer.
        loras: files and the strengths with which they go in; 0 leaves one out, after it has been looked at.

    Raises:
        ValueError: a file that cannot be read, is for another model, or of a kind that is not read; names file and
            tensor, and says how many of how many do not fit.
    """
    if not loras:
        return NO_ADAPTERS
    layers = Layers(kind, config)
    patches: dict[str, list[Patch]] = {}
    for path, strength in loras:
        if not math.isfinite(strength):
            raise ValueError(f"{path} cannot go in with a strength of {strength}; take a number such as 1.0")
        for key, patch in read_lora(layers, Path(path)):
            if strength:
                patches.setdefault(key, []).append(replace(patch, strength=strength * patch.strength))
    on = [(Path(path), strength) for path, strength in loras if strength]
    title = ", ".join(f"{path.stem} at {strength:g}" for path, strength in on)
    return AdapterSet(" + ".join(f"{path}:{strength!r}" for path, strength in on), patches, title)


def read_lora(layers: Layers, path: Path) -> list[tuple[str, Patch]]:
    """What one file changes: keys of the single file, and patches of a strength of 1.

    Raises:
        ValueError: as `read_loras`.
    """
    check_suffix(path)
    stored = read_header(path)
    found, missing = _sorted_by_layer(layers, path, stored)
    if missing or not found:
        first = f", the first is {missing[0]}" if missing else ""
        raise ValueError(
            f"{len(missing)} of {len(stored)} tensors in {path} are of no weight that {layers.title} has{first}; it is "
            "a LoRA for another model, or in a form that is not read"
        )
    scale_of = _stated_scale(path, any(name.startswith(PREFIXES[0]) for name in stored))
    patches, wrong = [], []
    with FileReader() as reader:
        for (layer, place), parts in found.items():
            tensors = {part: _read(reader, tensor) for part, tensor in parts.items()}
            first = next(iter(parts.values())).key
            patch = _patch(path, layer, tensors, scale_of)
            patch = replace(patch, offset=place.offset, swap=place.swap)
            try:
                patch.check(layers.shapes[place.key])
            except ValueError as error:
                wrong.append(f"{first} {error}")
            patches.append((place.key, patch))
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(patches)} weights that {path} changes have another size in this model: {wrong[0]}; "
            "it is a LoRA for another model"
        )
    return patches


def _sorted_by_layer(
    layers: Layers, path: Path, stored: Mapping[str, StoredTensor]
) -> tuple[dict[tuple[str, Place], dict[str, StoredTensor]], list[str]]:
    """The tensors of each patch by what they are to it, and the names that belong to nothing."""
    found: dict[tuple[str, Place], dict[str, StoredTensor]] = {}
    missing = []
    for name, tensor in stored.items():
        for end, what in _REFUSED.items():
            if re.search(rf"{end}$", name):
                raise ValueError(
                    f"{name} in {path} is of {what}, which is not read here; LoRA, LoCon of linears, DoRA, LoHa, LoKr "
                    "and plain differences are. ComfyUI's loaders may have it, or merge it into a checkpoint"
                )
        match = _TENSOR.fullmatch(name)
        place = None
        if match is not None:
            part = match["part"] or _SIDES[match["side"] or match["letter"]]
            place = layers.find(match["layer"], "bias" if part == "diff_b" else "weight")
        if match is None or place is None:
            missing.append(name)
            continue
        # A layer may have a low-rank part and a difference, which are patches of their own.
        kind = part if part.startswith("diff") else ""
        found.setdefault((f"{match['layer']}{kind and '.' + kind}", place), {})[part] = tensor
    return found, missing


def _read(reader: FileReader, stored: StoredTensor) -> Tensor:
    if stored.dtype not in WEIGHT_DTYPES and not stored.key.endswith(".alpha"):
        raise ValueError(f"{stored.key} in {stored.file} is stored as {stored.dtype}, which is not read")
    tensor = reader.whole(stored)
    if tensor.itemsize == 1:
        tensor = tensor.to(torch.bfloat16)  # of the same values, and of which rows can be taken
    if tensor.numel() and not torch.stack(torch.aminmax(tensor.float())).isfinite().all():
        raise ValueError(f"{stored.key} in {stored.file} holds values that are not finite numbers; download it again")
    return tensor


def _stated_scale(path: Path, is_peft: bool) -> Callable[[str, int], float]:
    """What low-rank products without an alpha of their own are multiplied by, of a layer's name and its rank.

    Where diffusers or peft have written the configuration of training, it has the alphas; else it is 1.
    """
    text, config = read_metadata(path).get(PEFT_METADATA), {}
    with blamed(path):
        if text is not None:
            config = {key.removeprefix("transformer."): value for key, value in parse_object(text).items()}
        elif is_peft and path.with_name(PEFT_CONFIG).is_file():
            config = read_object(path.with_name(PEFT_CONFIG), "")
        alpha = config.get("lora_alpha")
        # As peft finds them: a regular expression of the name's end.
        patterns = [
            (re.compile(rf"(.*\.)?({name})"), float(value))
            for name, value in (config.get("alpha_pattern") or {}).items()
        ]
        alpha = None if alpha is None else float(alpha)

    def scale(layer: str, rank: int) -> float:
        stated = next((value for pattern, value in patterns if pattern.fullmatch(layer)), alpha)
        if stated is None:
            return 1.0
        return stated / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _patch(path: Path, layer: str, tensors: Mapping[str, Tensor], scale_of: Callable[[str, int], float]) -> Patch:
    """One patch of its tensors."""

    def matrix(part: str) -> Tensor:
        tensor = tensors.get(part)
        if tensor is None:
            raise ValueError(f"{layer} in {path} has {', '.join(sorted(tensors))}, but no {part}; download it again")
        if tensor.ndim > 2 and math.prod(tensor.shape[2:]) > 1:
            raise ValueError(f"{layer} in {path} is an adapter of a convolution, which is not read")
        return tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]

    def product(first: str, second: str) -> Tensor:
        a, b = matrix(first), matrix(second)
        if a.shape[1] != b.shape[0]:
            raise ValueError(f"{layer} in {path} has a rank of {a.shape[1]} in {first} and of {b.shape[0]} in {second}")
        return a.float() @ b.float()

    rank, dora = None, tensors.get("dora_scale")
    if "diff" in tensors or "diff_b" in tensors:
        return Patch("diff", tuple(tensors.values()))
    if any(part.startswith("hada") for part in tensors):
        factors = tuple(matrix(f"hada_w{number}_{side}") for number in "12" for side in "ab")
        kind, rank = "loha", factors[1].shape[0]
    elif any(part.startswith("lokr") for part in tensors):
        whole = ["lokr_w1" in tensors, "lokr_w2" in tensors]
        factors = tuple(
            matrix(f"lokr_w{number}") if is_whole else product(f"lokr_w{number}_a", f"lokr_w{number}_b")
            for number, is_whole in zip("12", whole, strict=True)
        )
        kind = "lokr"
        # The rank of the last factor that is decomposed; whole factors have no alpha. As ComfyUI has it.
        rank = None if all(whole) else matrix("lokr_w1_b" if whole[1] else "lokr_w2_b").shape[0]
    else:
        kind, factors = "lora", (matrix("up"), matrix("down"))
        rank = factors[1].shape[0]
    if kind != "lokr" and any(a.shape[1] != b.shape[0] for a, b in zip(factors[::2], factors[1::2], strict=True)):
        raise ValueError(f"{layer} in {path} has factors {[list(one.shape) for one in factors]}, which do not multiply")
    if rank is not None and "alpha" in tensors:
        factor = float(tensors["alpha"]) / rank
    else:
        factor = scale_of(layer, rank) if kind == "lora" and rank else 1.0
    if dora is None:
        return Patch(kind, factors, strength=factor)
    return Patch(kind, factors, dora=dora.flatten(1) if dora.ndim > 1 else dora[:, None], alpha=factor)
