"""How ComfyUI's single files say that layers are quantized: in which formats, with which tensors, and what for.

There are three ways: a table in the file's header, a tensor of JSON beside each layer's weight (``comfy_quant``), and
in older files one marker for all of them (``scaled_fp8``). Read are the formats of `FORMATS`, and fp8 with one scale a
tensor, or one for each of its rows, as LightX2V writes it, which says so by the scale's shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..families.others import INSTEAD
from ..parallel.formats import FORMATS, options_problem
from ..parallel.kitchen import REMEDY, has_kitchen
from .config_files import parse_object
from .safetensors_reader import WEIGHT_DTYPES, StoredLayer, StoredTensor, read_metadata

FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
TABLE, TENSOR, MARKER = FP8_LAYOUTS = ("_quantization_metadata", "comfy_quant", "scaled_fp8")
"""In the header, beside each layer's weight, and one for all layers."""
BESIDE = ("weight_scale", "scale_weight", "input_scale", "scale_input", TENSOR, MARKER)
"""Last parts of keys that stand beside weights and say how they are quantized."""
_NUMBERS = {"I8": "8-bit integers", "U8": "bytes, such as packed numbers of 4 bits"}
"""What weights in formats that are not read are stored as -> what those are."""
PARTS = ("model.diffusion_model.", "text_encoders.", "vae.")
"""What layers of a file with several models begin with; one that begins otherwise is of the model that is looked at."""
_LAYER_BYTES = 2**16
"""More than any layer's JSON has."""


@dataclass(frozen=True)
class Quantization:
    """What a file says of its layers.

    Args:
        keys: the model's tensors, by their keys without a prefix.
        fp8_layers: layers that are made for being multiplied in 8 bits, by their names without a prefix.
        layers: those in one of `FORMATS`, by their names without a prefix.
    """

    keys: Mapping[str, StoredTensor]
    fp8_layers: frozenset[str]
    layers: Mapping[str, StoredLayer] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, of packed weights those that they stand for."""
        packed = {f"{layer}.weight": stored.shape for layer, stored in self.layers.items()}
        return {key: tensor.shape for key, tensor in self.keys.items()} | packed

    def is_beside(self, key: str) -> bool:
        """Whether a tensor is one of a quantized layer's, beside its weight."""
        layer, _, leaf = key.rpartition(".")
        stored = self.layers.get(layer)
        return leaf in BESIDE if stored is None else leaf in stored.parts or leaf == TENSOR

    def made_for_fp8(self, layer: str) -> bool:
        """Whether a layer's inputs, too, may be made 8 bits to multiply it."""
        return layer in self.fp8_layers

    def scale(self, layer: str) -> StoredTensor | None:
        """What a layer's weight, or each of its rows, is multiplied by; ValueError where it is something else."""
        weight = self.keys.get(f"{layer}.weight")
        rows = weight.shape[:1] if weight is not None else ()
        return self._find(layer, rows, "weight_scale", "scale_weight")

    def input_scale(self, layer: str) -> StoredTensor | None:
        """What a layer's inputs are divided by before they are made 8 bits; ValueError where that is not one number."""
        return self._find(layer, (), "input_scale", "scale_input") if self.made_for_fp8(layer) else None

    def _find(self, layer: str, rows: tuple[int, ...], *names: str) -> StoredTensor | None:
        for name in names:
            scale = self.keys.get(f"{layer}.{name}")
            if scale is not None:
                if math.prod(scale.shape) != 1 and (not rows or scale.shape not in (rows, (*rows, 1))):
                    of = f" of the shape {list(scale.shape)} for {rows[0]} rows" if rows else ""
                    raise ValueError(
                        f"{scale.key} holds {math.prod(scale.shape)} scales{of}, which is not read; {INSTEAD}"
                    )
                return scale
        return None


def read_quantization(path: Path, keys: Mapping[str, StoredTensor], prefix: str) -> Quantization:
    """Read what a file says of its layers: its header, and the few bytes of tensors that hold JSON.

    Args:
        path: of the file.
        keys: the model's tensors, by their keys without the prefix.
        prefix: in front of those keys in the file.

    Raises:
        ValueError: a layer is quantized in a way that is not read, or what says how cannot be read; names it.
    """
    said = _layers(path, keys, prefix)
    layers = {}
    for layer, says in said.items():
        form = says.get("format")
        if form in FORMATS and f"{layer}.weight" in keys:
            layers[layer] = _stored_layer(path, layer, says, keys)
        elif form not in (*FORMATS, *FP8_FORMATS):
            raise ValueError(f"{path} stores {layer} in the format {str(form)[:100]}, which is not read; {INSTEAD}")
    if layers and not has_kitchen():
        titles = " and ".join(sorted({FORMATS[stored.format].title for stored in layers.values()}))
        raise ValueError(f"{path} has weights in {titles}, for which comfy-kitchen is needed: {REMEDY}")
    for key, tensor in keys.items():
        layer = key.removesuffix(".weight")
        if tensor.dtype not in WEIGHT_DTYPES and key.endswith(".weight") and layer not in layers:
            what = f" ({_NUMBERS[tensor.dtype]})" if tensor.dtype in _NUMBERS else ""
            raise ValueError(f"{key} in {path} is stored as {tensor.dtype}{what}, which is not read; {INSTEAD}")
    made_for = [layer for layer, says in said.items() if not says.get("full_precision_matrix_mult")]
    return Quantization(keys, frozenset(made_for), layers)


def _stored_layer(path: Path, layer: str, says: Mapping[str, Any], keys: Mapping[str, StoredTensor]) -> StoredLayer:
    """The tensors of a layer in one of `FORMATS`; ValueError where one is missing or cannot be what the format says."""
    about = FORMATS[says["format"]]
    options = {name: says.get(name, value) for name, value in about.options.items()}
    if problem := options_problem(options):
        raise ValueError(f"{path} says of {layer} ({about.title}) that {problem}; download it again")
    weight = keys[f"{layer}.weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(
            f"{weight.key} in {path} has shape {list(weight.shape)}; weights in {about.title} have two dims"
        )
    rows, columns = weight.shape[0], weight.shape[1] * about.packed
    group = math.lcm(about.rotation(options) or 1, options.get("group_size") or 1)
    if columns % group:
        raise ValueError(
            f"{weight.key} in {path} has {columns} columns, no multiple of its groups of {group}; the file, or "
            "what it says of itself, is damaged"
        )
    parts = {}
    for name, part in about.parts.items():
        tensor = keys.get(f"{layer}.{name}")
        if tensor is None:
            if part.optional:
                continue
            raise ValueError(
                f"there is no tensor {layer}.{name} in {path}, which its {about.title} needs; download it again"
            )
        if tensor.dtype not in part.dtypes:
            raise ValueError(
                f"{tensor.key} in {path} is stored as {tensor.dtype}; in {about.title} it is {' or '.join(part.dtypes)}"
            )
        shapes = part.shapes(rows, columns, options)
        if tensor.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{tensor.key} in {path} has shape {list(tensor.shape)}, where {about.title} of {rows} rows and "
                f"{columns} columns has {expected}; the file is damaged"
            )
        parts[name] = tensor
    return StoredLayer(says["format"], options, parts, not says.get("full_precision_matrix_mult"))


def _layers(path: Path, keys: Mapping[str, StoredTensor], prefix: str) -> dict[str, dict[str, Any]]:
    """What is said of each quantized layer. The header counts first, as in ComfyUI."""
    layers = {
        key.removesuffix(f".{TENSOR}"): _read_layer(tensor)
        for key, tensor in keys.items()
        if key.endswith(f".{TENSOR}")
    }
    table = read_metadata(path).get(TABLE)
    if table is not None:
        try:
            stated = parse_object(table)["layers"]
            layers |= {
                layer.removeprefix(prefix): dict(says)
                for layer, says in stated.items()
                if layer.startswith(prefix) or not layer.startswith(PARTS)
            }
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"{path} has unreadable {TABLE} ({error!r}); download it again") from None
    elif MARKER in keys:
        # The marker's length says whether inputs stay as they are: two elements, or none (or one).
        says = {"format": FP8_FORMATS[0], "full_precision_matrix_mult": math.prod(keys[MARKER].shape) == 2}
        scaled = (key.removesuffix(".scale_weight") for key in keys if key.endswith(".scale_weight"))
        layers |= dict.fromkeys(scaled, says)
    nested = {layer: says.get("params") for layer, says in layers.items()}
    return {
        layer: {**params, **layers[layer]} if isinstance(params, dict) else layers[layer]
        for layer, params in nested.items()
    }


def _read_layer(tensor: StoredTensor) -> dict[str, Any]:
    """The JSON in a layer's ``comfy_quant``."""
    try:
        if tensor.dtype != "U8" or tensor.nbytes > _LAYER_BYTES:
            raise ValueError(f"{tensor.nbytes} bytes of {tensor.dtype}")
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.offset)
            return parse_object(stream.read(tensor.nbytes))
    except (OSError, ValueError) as error:
        raise ValueError(f"{tensor.key} in {tensor.file} is unreadable ({error!r}); download it again") from None
