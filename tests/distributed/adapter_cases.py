"""What the ranks of the test world do with patches of weights: their slices against those of a patched file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.loading.adapters import NO_ADAPTERS, AdapterSet, Patch
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallel.products import Adapted, named_weights
from parallel_backend.runtime.rank.component import ModelSettings
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
    size = sum(product.down.nbytes + product.up.nbytes for product in held.values())
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
        worst = max(worst, float((product.up @ product.down - wanted).abs().max() / wanted.abs().max()))
    part.adapt(NO_ADAPTERS)
    assert part.nbytes == before
    return {"error": worst, "count": count, "left": bool(adapted(part.module))}


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
