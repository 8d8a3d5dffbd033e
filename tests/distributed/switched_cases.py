"""What the ranks of the test world do with patches that change: by numbers alone, compiled, read again, half-way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from parallel_backend.config import AS_IT_IS, ParallelismConfig, Speed
from parallel_backend.families import Conditioning
from parallel_backend.loading import adapted_weights
from parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet, Patch
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.mesh import ParallelMesh
from parallel_backend.runtime.rank import adaptable_component
from parallel_backend.runtime.rank.component import ModelSettings, Place
from parallel_backend.runtime.rank.transformer_component import TransformerComponent
from tests.distributed.adapter_cases import adapted, applied, parameters, patches, random, rows_of
from tests.distributed.cases import relative_error
from tests.single_file import CHANNELS, TEXT


def component(
    mesh: ParallelMesh, layout: ParallelismConfig, path: Path, fp8: str = "cast", speed: Speed = AS_IT_IS
) -> TransformerComponent:
    settings = ModelSettings(open_checkpoint(path), layout, mesh, torch.device("cpu"), torch.float32, fp8, speed)
    part = TransformerComponent(settings)
    part.load(lambda count: None)
    return part


def lora(shapes: dict[str, Tensor], rank: int, seed: int, strength: float, name: str, **how: Any) -> AdapterSet:
    """A LoRA of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        key: [Patch("lora", (random(generator, len(w), rank), random(generator, rank, w.shape[1]) * w.shape[1] ** -0.5),
                    strength, **how)]
        for key, w in shapes.items() if w.ndim == 2
    }  # fmt: skip
    return AdapterSet(name, found)


def at(adapters: AdapterSet, strength: float) -> AdapterSet:
    """The same one at another strength."""
    of = {key: [replace(p, strength=strength) for p in found] for key, found in adapters.patches.items()}
    return AdapterSet(f"{adapters.name} {strength}", of)


def both(one: AdapterSet, other: AdapterSet) -> AdapterSet:
    keys = {**one.patches, **other.patches}
    of = {key: [*one.patches.get(key, ()), *other.patches.get(key, ())] for key in keys}
    return AdapterSet(f"{one.name} and {other.name}", of)


def evaluated(part: TransformerComponent, text: int = 8, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    kind = part.settings.family.transformer
    x = random(generator, 1, CHANNELS, side, side)
    conditioning = Conditioning(random(generator, 1, text, TEXT), [], {"guidance": torch.full((1,), 3.5)})
    with torch.no_grad():
        return kind.evaluate(part.module, kind.inputs(x, torch.full((1,), 0.7), conditioning), x)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many parameters are read from the file, each time that something is."""
    found: list[int] = []
    original = adaptable_component.load_weights

    def load(*args: Any, **kwargs: Any) -> int:
        found.append(len(kwargs["again"]))
        return original(*args, **kwargs)

    with patch.object(adaptable_component, "load_weights", load):
        yield found


def slice_of(part: TransformerComponent, full: dict[str, Tensor], name: str) -> Tensor:
    whole = torch.cat([rows_of(full, *piece) for piece in part.settings.family.transformer.file_rows(name)])
    shard = part.table.get(name)
    return whole if shard is None else shard.take(whole)


def switched(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, Any]:
    """Of a LoRA that comes and goes over merged ones: its error, what is read, whether what is merged stays."""
    tensors = load_file(path)
    part, asked = component(mesh, layout, Path(path)), []
    below = patches()
    nbytes, clean = part.nbytes, parameters(part)
    part.adapt(below)
    merged, first = parameters(part), evaluated(part)
    over = lora(tensors, 3, 21, 0.5, "over", switched=True)
    full = {key: applied(torch.zeros_like(tensors[key]), of) for key, of in over.patches.items()}
    worst = 0.0
    with counted() as read:
        part.adapt(both(below, over), asked.append)
        held = adapted(part.module)
        for name, product in held.items():
            wanted = slice_of(part, full, name)
            delta = product.up * product.strengths @ product.down
            worst = max(worst, float((delta - wanted).abs().max() / wanted.abs().max()))
        on = evaluated(part)
        part.adapt(both(below, at(over, 0.0)), asked.append)
        off = evaluated(part)
        part.to_host()
        part.to_device()
        part.adapt(both(below, at(over, 0.5)), asked.append)
        again = evaluated(part)
        stays = all(torch.equal(tensor, merged[name]) for name, tensor in parameters(part).items())
        size = sum(t.nbytes for product in held.values() for t in (product.down, product.up, product.strengths))
        assert part.nbytes == nbytes + size
        part.adapt(below)
    kept = asked[1:] == [0, 0] and asked[0] >= size
    found = {
        "error": worst, "count": len(held), "read": read, "stays": stays, "off": relative_error(off, first),
        "on": relative_error(on, first), "again": torch.equal(again, on), "asked": kept,
        "left": bool(adapted(part.module)) or part.nbytes != nbytes or not torch.equal(evaluated(part), first),
    }  # fmt: skip
    part.adapt(NO_ADAPTERS)
    return found | {"undone": all(torch.equal(t, clean[name]) for name, t in parameters(part).items())}


def compiled(mesh: ParallelMesh, layout: ParallelismConfig, path: str, plain: bool) -> dict[str, list]:
    """How many graphs there are after each of several sets, and the errors against blocks that are not compiled."""
    tensors = {key: w for key, w in load_file(path).items() if not key.endswith("_scale")}
    torch._dynamo.reset()
    counters.clear()
    compiler = torch.compile

    def traced(core: Any, options: Any, **how: Any) -> Any:
        return compiler(core, backend="eager", **how)  # what is counted are graphs, not what becomes of them

    with patch.object(torch, "compile", traced):
        parts = [component(mesh, layout, Path(path), "stored", speed) for speed in (Speed(compile=True), AS_IT_IS)]
    how = {"switched": plain}
    one, two = lora(tensors, 3, 31, 0.5, "one", **how), lora(tensors, 11, 32, -0.7, "two", **how)
    graphs, errors = [], []
    with torch.inference_mode():
        for adapters in (one, at(one, 2.0), two, at(one, 0.0), NO_ADAPTERS, two, NO_ADAPTERS, one):
            for part in parts:
                part.adapt(adapters)
            errors.append(relative_error(*(evaluated(part) for part in parts)))
            graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "errors": errors}


def read_again(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, Any]:
    """What is read from the file by a set of which one weight is another, and what by taking it off."""
    part = component(mesh, layout, Path(path))
    clean = parameters(part)
    first = patches()
    key = "single_blocks.0.linear2.weight"
    other = AdapterSet("other", {**first.patches, key: [replace(first.patches[key][0], strength=0.2)]})
    with counted() as read:
        part.adapt(first)
        part.adapt(other)
        one = parameters(part)
        part.adapt(NO_ADAPTERS)
    undone = all(torch.equal(t, clean[name]) for name, t in parameters(part).items())
    fresh = component(mesh, layout, Path(path))
    fresh.adapt(other)
    same = all(torch.equal(t, one[name]) for name, t in parameters(fresh).items())
    return {"read": read, "undone": undone, "same": same, "count": len(patches().patches)}


def half_applied(mesh: ParallelMesh, layout: ParallelismConfig, path: str) -> dict[str, Any]:
    """What is said where the file is gone or a set fails half-way, and whether the weights are right afterwards."""
    copy = Path(path).with_name(f"copy-{mesh.world.rank}.safetensors")
    shutil.copy(path, copy)
    part = component(mesh, layout, copy)
    clean = parameters(part)
    part.adapt(patches())
    merged = parameters(part)
    gone = copy.with_suffix(".gone")
    copy.rename(gone)
    found: dict[str, Any] = {}
    try:
        part.adapt(NO_ADAPTERS)
    except ValueError as error:
        found["text"] = str(error)
    gone.rename(copy)
    part.adapt(NO_ADAPTERS)
    found["after the file"] = all(torch.equal(t, clean[name]) for name, t in parameters(part).items())
    patched, calls = adapted_weights.patch_rows, 0

    def fails(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("no room")
        patched(*args)

    def tried(work: Any) -> str:
        nonlocal calls
        calls = 0
        with patch.object(adapted_weights, "patch_rows", fails):
            try:
                work()
            except RuntimeError as error:
                return str(error)
        return ""

    found["failed"] = tried(lambda: part.adapt(patches()))
    part.adapt(NO_ADAPTERS)
    found["after half"] = all(torch.equal(t, clean[name]) for name, t in parameters(part).items())
    found["failed again"] = tried(lambda: part.adapt(patches()))
    part.adapt(patches())
    found["whole"] = all(torch.equal(t, merged[name]) for name, t in parameters(part).items())
    # Loaded anew it has the set, or is not there: never the file's own weights in silence.
    part.drop()
    found["loading failed"] = tried(lambda: part.load(lambda count: None))
    found["place"] = part.place is Place.FILE
    part.load(lambda count: None)
    found["loaded"] = all(torch.equal(t, merged[name]) for name, t in parameters(part).items())
    copy.unlink()
    return found
