"""What the ranks of the test world do with patches of weights: their slices against those of a patched file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.loading import adapters, wide_adapters
from parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet, Patch
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallel.products import Adapted, Instead, Product, named_weights
from parallel_backend.runtime.rank.adaptable_component import AdaptableComponent
from parallel_backend.runtime.rank.component import ModelSettings
from parallel_backend.runtime.rank.text_component import TextEncoderComponent
from parallel_backend.runtime.rank.transformer_component import TransformerComponent
from tests.single_file import flux2_shapes

HEADS, RANK = 4, 3
SIZE = {"heads": HEADS, "double": 1, "single": 1}


def patches() -> AdapterSet:
    """A product of thin matrices for every matrix of the file, of the last layer's with halves swapped."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for key, shape in flux2_shapes(**SIZE).items():
        if len(shape) == 2:
            up, down = (
                torch.randn(shape[0], RANK, generator=generator),
                torch.randn(RANK, shape[1], generator=generator),
            )
            found[key] = [Patch("lora", (up, down), 0.05, swap=key.startswith("final_layer.adaLN"))]
        else:
            # ComfyUI calls the weights of norms so, whatever the file does.
            name = key.replace(".scale", ".weight")
            found[name] = [Patch("diff", (torch.randn(shape, generator=generator),), 0.1)]
    width = HEADS * 128
    # Of queries, keys and values in one the keys alone, on top.
    keys = torch.randn(width, RANK, generator=generator), torch.randn(RANK, width, generator=generator)
    found["double_blocks.0.img_attn.qkv.weight"].append(Patch("lora", keys, -0.1, offset=(0, width, width)))
    return AdapterSet("all", found)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def wide_patches() -> AdapterSet:
    """For every matrix of the file a patch whose effect on a slice depends on the rest of it, of all kinds in turn."""
    generator = torch.Generator().manual_seed(11)
    found: dict[str, list[Patch]] = {}
    kinds = itertools.cycle(WIDE)
    for key, shape in flux2_shapes(**SIZE).items():
        # Of the first of these, which is columns, and of the second, which is rows, all of them.
        of = WIDE if key in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear2.weight") else [next(kinds)]
        found |= {key: [wide_patch(kind, shape, generator) for kind in of]} if len(shape) == 2 else {}
    width = HEADS * 128
    qkv = found["double_blocks.0.txt_attn.qkv.weight"]
    for kind in ("dora rows", "dora columns", "glora", "oft"):  # of keys alone
        qkv.append(replace(wide_patch(kind, (width, width), generator), offset=(0, width, width)))
    qkv.append(Patch("diff", (random(generator, 3 * width, width),), 0.01, model_strength=0.9))
    return AdapterSet("wide", found)


WIDE = ("dora rows", "dora columns", "glora", "oft", "oft, dora columns", "oft, dora rows", "glora, dora columns")


def wide_patch(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Patch:
    """A patch of a weight of a shape; blocks of rows that are rotated end where no rank's slice does."""
    rows, columns = shape
    kind, _, dora = kind.partition(", ")
    if kind.startswith("dora"):
        kind, dora = "lora", kind
    lengths = {"": None, "dora rows": random(generator, rows, 1), "dora columns": random(generator, 1, columns)}[dora]
    if kind == "oft":
        size = next(size for size in (48, 32, 16, 8) if rows % size == 0)
        tensors = (torch.linalg.qr(random(generator, rows // size, size, size))[0],)
    else:
        tensors = random(generator, rows, RANK), random(generator, RANK, columns)
        if kind == "glora":
            tensors += 0.1 * random(generator, columns, RANK), 0.1 * random(generator, RANK, columns)
    return Patch(kind, tensors, 0.6, dora=lengths, alpha=0.3 if dora else 1.0)


def applied(full: Tensor, patches: list[Patch]) -> Tensor:
    """Patches on a full weight, in the words of the papers."""
    full = full.clone()
    for patch in patches:
        dim, start, length = patch.offset or (0, 0, len(full))
        w = full.narrow(dim, start, length).mul_(patch.model_strength)
        if patch.kind == "oft":
            (turn,) = patch.tensors
            delta = torch.cat([turn[b].T @ block for b, block in enumerate(w.split(turn.shape[1]))]) - w
        elif patch.kind == "diff":
            (delta,) = patch.tensors
        else:
            up, down, *inner = patch.tensors
            delta = up @ down + (w @ inner[0] @ inner[1] if inner else 0)
        if patch.dora is None:
            w += patch.strength * delta
            continue
        changed = w + patch.alpha * delta
        norm = w.norm(dim=1, keepdim=True) if len(patch.dora) == len(w) else changed.norm(dim=0, keepdim=True)
        w += patch.strength * (changed * patch.dora / norm - w)
    return full


def wide(mesh: ParallelMesh, layout: ParallelismConfig, path: str, patched_path: str) -> dict[str, float | bool]:
    """The largest error of slices that ranks patched together, and whether they are as the file's in the end."""
    clean, wanted = (parameters(component(mesh, layout, one)) for one in (path, patched_path))
    part, asked = component(mesh, layout, path), []
    part.adapt(wide_patches(), asked.append)
    assert asked[0] > 0
    now = parameters(part)
    error = max(float((now[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)
    part.adapt(NO_ADAPTERS)
    return {"error": error, "undone": all(torch.equal(t, clean[name]) for name, t in parameters(part).items())}


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, list | tuple) else [found]:
            self.nbytes = max(self.nbytes, one.nbytes if isinstance(one, Tensor) else 0)
        return found


def largest(mesh: ParallelMesh, layout: ParallelismConfig, path: str, wide: bool) -> tuple[int, int, int]:
    """Bytes in fp32 of the largest tensor that there is while patches are merged, of a slice, and of a full weight."""
    part = component(mesh, layout, path)
    slices = max(parameter.numel() for parameter in part.module.parameters())
    wanted, few = wide_patches() if wide else patches(), 2**16  # the chunks of larger weights
    with (
        Largest() as seen,
        replaced.object(adapters, "CHUNK_ELEMENTS", few),
        replaced.object(wide_adapters, "CHUNK_ELEMENTS", few),
    ):
        part.adapt(wanted)
    return seen.nbytes, 4 * slices, 4 * max(map(math.prod, flux2_shapes(**SIZE).values()))


def patched(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file with the patches in it holds."""
    out = {key: tensor.clone() for key, tensor in tensors.items()}
    for name, of in patches().patches.items():
        key = name if name in out else name.replace(".weight", ".scale")
        for patch in of:
            added = patch.tensors[0] if patch.kind == "diff" else patch.tensors[0] @ patch.tensors[1]
            added = torch.cat(added.chunk(2)[::-1]) if patch.swap else added
            rows = slice(None) if patch.offset is None else slice(patch.offset[1], patch.offset[1] + patch.offset[2])
            out[key][rows] += patch.strength * added
    return out


def component(mesh: ParallelMesh, layout: ParallelismConfig, path: str, fp8: str = "cast") -> TransformerComponent:
    source = open_checkpoint(Path(path))
    settings = ModelSettings(source, layout, mesh, torch.device("cpu"), torch.float32, fp8, AS_IT_IS)
    part = TransformerComponent(settings)
    part.load(lambda count: None)
    return part


def parameters(part: TransformerComponent) -> dict[str, Tensor]:
    return {name: parameter.data.clone() for name, parameter in part.module.named_parameters()}


def merged(mesh: ParallelMesh, layout: ParallelismConfig, path: str, patched_path: str) -> dict[str, float | bool]:
    """The largest error of a patched slice, and whether slices are as the file's again in the end."""
    clean, wanted = (parameters(component(mesh, layout, one)) for one in (path, patched_path))
    part = component(mesh, layout, path)

    def error() -> float:
        now = parameters(part)
        return max(float((now[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)

    places = {name: parameter.data_ptr() for name, parameter in part.module.named_parameters()}
    part.adapt(patches())
    found: dict[str, float | bool] = {"error": error()}
    assert places == {name: parameter.data_ptr() for name, parameter in part.module.named_parameters()}
    part.adapt(AdapterSet("other", {"img_in.weight": [Patch("scale", (), model_strength=2.0)]}))
    part.adapt(patches())
    found["after another"] = error()
    part.drop()
    part.load(lambda count: None)
    found["read again"] = error()
    part.adapt(NO_ADAPTERS)
    found["undone"] = all(torch.equal(tensor, clean[name]) for name, tensor in parameters(part).items())
    return found


def beside(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, float | bool]:
    """The largest error of what stands beside a slice in 8 bits, and whether nothing does in the end."""
    lora = patches()
    kept = AdapterSet("lora", {key: of for key, of in lora.patches.items() if all(p.kind == "lora" for p in of)})
    part, asked = component(mesh, layout, path, "stored"), []
    before = part.nbytes
    part.adapt(kept, asked.append)
    held = adapted(part.module)
    size = sum(t.nbytes for product in held.values() for t in (product.down, product.up, product.strengths))
    assert [size] == asked
    assert part.nbytes == before + size
    full = {key: torch.zeros(shape) for key, shape in flux2_shapes(**SIZE).items()}
    deltas, worst, count = patched(full), 0.0, 0
    for name, product in held.items():
        count += 1
        whole = torch.cat([rows_of(deltas, *piece) for piece in part.settings.family.transformer.file_rows(name)])
        shard = part.table.get(name)
        wanted = whole if shard is None else shard.take(whole)
        assert product.shape == tuple(wanted.shape)
        worst = max(
            worst,
            float((product.up * product.strengths @ product.down - wanted).abs().max() / wanted.abs().max()),
        )
    # Another strength, and another LoRA of about that rank, are values alone.
    places = {name: (product.down.data_ptr(), product.up.data_ptr()) for name, product in held.items()}
    part.adapt(AdapterSet("stronger", {key: [replace(p, strength=2 * p.strength) for p in of]
                                       for key, of in kept.patches.items()}), asked.append)  # fmt: skip
    assert asked[1:] == [0]
    now = adapted(part.module)
    assert places == {name: (product.down.data_ptr(), product.up.data_ptr()) for name, product in now.items()}
    for name, product in now.items():
        assert torch.equal(product.down, held[name].down)
        whole = torch.cat([rows_of(deltas, *piece) for piece in part.settings.family.transformer.file_rows(name)])
        shard = part.table.get(name)
        wanted = 2 * (whole if shard is None else shard.take(whole))
        worst = max(
            worst,
            float((product.up * product.strengths @ product.down - wanted).abs().max() / wanted.abs().max()),
        )
    part.adapt(NO_ADAPTERS)
    assert part.nbytes == before
    return {"error": worst, "count": count, "left": bool(adapted(part.module))}


def instead(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, float | bool]:
    """The largest error of what stands in the place of weights in 8 bits, and whether nothing does in the end."""
    part, asked = component(mesh, layout, path, "stored"), []
    before, clean = part.nbytes, products(part)
    kinds = wide_patches().patches | {"img_in.weight": [Patch("diff", (torch.ones(HEADS * 128, 128),), 0.1)]}
    part.adapt(AdapterSet("wide", kinds), asked.append)
    held = {name: product for name, product in named_weights(part.module).items() if isinstance(product, Instead)}
    assert part.nbytes == before + sum(product.weight.nbytes for product in held.values())
    assert asked[0] > part.nbytes - before  # with copies in fp32 for a while
    worst = 0.0
    rows = part.settings.family.transformer.file_rows
    stored = dequantized(path)
    full = stored | {key: applied(stored[key], of) for key, of in kinds.items()}
    for name, product in held.items():
        whole, shard = torch.cat([rows_of(full, *piece) for piece in rows(name)]), part.table.get(name)
        wanted = whole if shard is None else shard.take(whole)
        worst = max(worst, float((product.weight - wanted).abs().max() / wanted.abs().max()))
    part.adapt(NO_ADAPTERS)
    assert part.nbytes == before
    now = products(part)
    left = any(product is not clean[name] for name, product in now.items())
    return {"error": worst, "count": len(held), "left": left}


def products(part: AdaptableComponent) -> dict[str, Product]:
    return {name: one for name, one in named_weights(part.module).items() if isinstance(one, Product)}


def dequantized(path: str) -> dict[str, Tensor]:
    """What the weights of a file in fp8 stand for."""
    stored = load_file(path)
    return {
        key: tensor.float() * stored.get(f"{key}_scale", torch.tensor(1.0)).float() for key, tensor in stored.items()
    }


def adapted(module: torch.nn.Module) -> dict[str, Adapted]:
    return {name: held for name, held in named_weights(module).items() if isinstance(held, Adapted)}


def rows_of(tensors: dict[str, Tensor], key: str, part: int, parts: int) -> Tensor:
    return tensors[key].chunk(parts)[part]


def refused(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> tuple[str, bool]:
    """What is said of a patch that no weight takes, and whether nothing was changed by it."""
    part = component(mesh, layout, path)
    before, text = parameters(part), ""
    of = {"img_in.weight": patches().patches["img_in.weight"], "not_there.weight": [Patch("scale", ())]}
    try:
        part.adapt(AdapterSet("half", of))
    except ValueError as error:
        text = str(error)
    return text, all(torch.equal(tensor, before[name]) for name, tensor in parameters(part).items())


def text_component(mesh: ParallelMesh, layout: ParallelismConfig, path: str, fp8: str = "cast") -> TextEncoderComponent:
    source = open_checkpoint(Path(path))
    settings = ModelSettings(source, layout, mesh, torch.device("cpu"), torch.float32, fp8, AS_IT_IS)
    part = TextEncoderComponent(settings)
    part.load(lambda count: None)
    return part


def text_patches(layers: Mapping[str, Tensor]) -> AdapterSet:
    """A product of thin matrices for every matrix of a text encoder's, and rows of other lengths for every fifth."""
    generator = torch.Generator().manual_seed(13)
    found = {}
    for number, (key, weight) in enumerate(sorted(layers.items())):
        if weight.ndim == 2:
            found[key] = [
                Patch("lora", (random(generator, len(weight), 3), random(generator, 3, weight.shape[1])), 0.2)
            ]
            if number % 5 == 0:
                found[key].append(wide_patch(WIDE[number % 4], tuple(weight.shape), generator))
    return AdapterSet("text", found)


def text(mesh: ParallelMesh, layout: ParallelismConfig, path: str, patched_path: str) -> dict[str, float | bool]:
    """The largest error of a text encoder's patched slices, and whether they are as the file's in the end."""
    clean, wanted = (parameters(text_component(mesh, layout, one)) for one in (path, patched_path))
    part = text_component(mesh, layout, path)
    part.adapt(text_patches(load_file(path)))
    now = parameters(part)
    error = max(float((now[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)
    part.adapt(NO_ADAPTERS)
    return {"error": error, "undone": all(torch.equal(t, clean[name]) for name, t in parameters(part).items())}
