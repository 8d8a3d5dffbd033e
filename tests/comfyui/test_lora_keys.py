"""Every name that stock ComfyUI maps a LoRA's layers by, what it merges to the bit, and what is refused by name."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend.config import AS_IT_IS, ParallelismConfig
from parallel_backend.loading.adapters import AdapterSet, Patch
from parallel_backend.loading.checkpoint import open_checkpoint
from parallel_backend.mesh import single_mesh
from parallel_backend.runtime.rank.component import ModelSettings
from parallel_backend.runtime.rank.transformer_component import TransformerComponent
from tests.errors import relative_error
from tests.single_file import flux2_tensors, write

from .graphs import (
    Graph,
    NodeId,
    add_loader,
    add_prompt,
    add_reference,
    run_well,
    save_latent,
    saved_latent,
)
from .lora_files import FILE, PARITY, SHAPES, draw, low_rank, ours, random, with_loras, write_loras
from .qwen_models import PIPELINE
from .server import ComfyServer
from .test_errors import failure
from .test_lora import refusal
from .test_lora_hooks import hooked

SPELLINGS = ("diffusion_model.", "transformer.", "lycoris_", "lora_transformer_", "lora_unet_", "")
SUFFIXES = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)
PREFIX = "diffusion_model."
NAMES = (
    "sorted((name, *((to,) if isinstance(to, str) else (*to[:2], len(to) > 2))) for name, to in "
    "__import__('comfy.lora').lora.model_lora_keys_unet(m.model, {}).items() if name.isascii())"
)
"""ComfyUI's own map of names: name, key, and of a part of a weight where it is and whether its halves are swapped."""
FOUND = (
    "sorted((key, [(p[0], type(p[1]).__name__, [tuple(t.shape) for t in p[1].weights[:2]], p[2:4], p[4] is None) "
    "for p in of]) for key, of in m.patches.items())"
)


@pytest.fixture(scope="module")
def loras(server: ComfyServer) -> dict[str, str]:
    return write_loras(server)


def look(server: ComfyServer, graph: Graph, *asked: tuple[NodeId, str]) -> list[str]:
    nodes = [graph.add("ReferenceLook", model=model, expression=expression) for model, expression in asked]
    outputs = run_well(server, graph).outputs
    return [outputs[str(node)]["text"][0] for node in nodes]


def both(graph: Graph, file: str) -> list[NodeId]:
    """Ours and ComfyUI's own; it does not recognize a Qwen-Image that is this small in a file."""
    if file != FILE:
        return [add_loader(graph, PIPELINE, ulysses=1, tp=1), add_reference(graph, PIPELINE)]
    return [ours(graph, "TP-2"), graph.add("UNETLoader", unet_name=file, weight_dtype="default")]


def spelled(names: list[tuple[Any, ...]], shapes: Mapping[str, tuple[int, ...]], number: int) -> dict[str, Tensor]:
    """A LoRA of rank 1 under all names of one spelling whose weights a model has, and that fit it."""
    tensors: dict[str, Tensor] = {}
    for name, key, *part in names:
        shape = shapes.get(key.removeprefix(PREFIX), ())
        if len(shape) != 2 or (part and part[0] is not None and part[0][1] + part[0][2] > shape[part[0][0]]):
            continue
        rows, columns = (part[0][2] if part and part[0] is not None and part[0][0] == d else shape[d] for d in (0, 1))
        up, down = SUFFIXES[number % len(SUFFIXES)]
        tensors |= {f"{name}{up}": random(rows, 1), f"{name}{down}": random(1, columns)}
    return tensors


@pytest.mark.parametrize("family", ["FLUX.2", "Qwen-Image"])
def test_as_many_patches_as_stock_finds(family, loras, request):
    """By every name in ComfyUI's own map, in every spelling and suffix: the same patches of the same weights."""
    server = request.getfixturevalue("server" if family == "FLUX.2" else "qwen")
    file = FILE if family == "FLUX.2" else "qwen.safetensors"
    graph = Graph()
    mine, theirs = look(server, graph, *((one, NAMES) for one in both(graph, file)))
    assert mine == theirs
    stored = load_file(server.models / "diffusion_models" / file)
    shapes = {key.removeprefix(PREFIX): tuple(tensor.shape) for key, tensor in stored.items()}
    by_spelling: dict[str, list[tuple[Any, ...]]] = {}
    for entry in ast.literal_eval(mine):
        by_spelling.setdefault(next(p for p in SPELLINGS if entry[0].startswith(p)), []).append(entry)
    graph, files = Graph(), {}
    for number, (spelling, names) in enumerate(by_spelling.items()):
        for suffix in range(number, number + (len(SUFFIXES) if spelling == "" else 1)):
            tensors = spelled(names, shapes, suffix)
            name = f"{family}{spelling}{suffix}.safetensors"
            save_file(tensors, server.models / "loras" / name)
            files[name] = spelling, len(tensors) // 2
    models = both(graph, file)
    asked = [(with_loras(graph, model, (name, 0.5)), FOUND) for name in files for model in models]
    found = look(server, graph, *asked)
    assert {spelling for spelling, count in files.values() if count} >= {"diffusion_model.", "transformer.", "lycoris_"}
    assert "" in by_spelling
    for (name, (_, count)), mine, theirs in zip(files.items(), found[::2], found[1::2], strict=True):
        assert mine == theirs, name
        # Names that mean the same weight, or the same part of it, count once.
        assert 0 < sum(len(of) for _, of in ast.literal_eval(mine)) <= count, name


def test_half_of_it_fits(server, loras):
    """Where stock leaves the weights that do not fit as they are, and says so in its log."""
    keys = ["double_blocks.0.img_attn.proj", "double_blocks.1.img_attn.proj"]
    tensors: dict[str, Tensor] = {}
    for key, more in zip(keys, (0, 8), strict=True):
        rows, columns = SHAPES[f"{key}.weight"]
        tensors |= low_rank(f"{PREFIX}{key}", rows, columns + more)
    text = refusal(server, "half", tensors)
    assert "1 of 2 weights that the LoRA changes have another size in this model" in text
    assert f"{PREFIX}{keys[1]}.weight" in text


@pytest.mark.parametrize(("name", "what"), [("reshape_weight", "reshape_weight"), ("diff", "makes a weight larger")])
def test_a_layer_that_would_grow(server, loras, name, what):
    """As of control LoRAs, whose input has more channels."""
    base, (rows, columns) = f"{PREFIX}img_in", SHAPES["img_in.weight"]
    tensors = low_rank(base, rows, 2 * columns)
    tensors[f"{base}.reshape_weight"] = torch.tensor([rows, 2 * columns])
    if name == "diff":
        graph = Graph()
        statements = f"m.add_patches({{'{base}.weight': ('diff', (torch.ones({rows}, {2 * columns}), "
        changed = graph.add(
            "ReferenceChange", model=ours(graph, "TP-2"), statements=statements + "{'pad_weight': True}))})"
        )
        graph.add("PreviewAny", source=changed)
        text = failure(server, graph, changed)
    else:
        text = refusal(server, name, tensors)
    assert f"{base}.weight is changed by" in text
    assert what in text
    assert "Bypass the node" in text


def test_a_whole_model_as_lora(server, loras):
    """A hook of another checkpoint's weights, less this one's."""
    folder = server.models / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = flux2_tensors(heads=2)
    save_file({f"model.{PREFIX}{key}": tensor for key, tensor in tensors.items()}, folder / "as-lora.safetensors")
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    hooks = graph.add("CreateHookModelAsLoraModelOnly", ckpt_name="as-lora.safetensors", strength_model=1.0)
    latent = hooked(graph, ours(graph, "TP-2"), positive, positive, hooks)
    sampler = NodeId(graph[str(latent)]["inputs"]["samples"][0])
    text = failure(server, graph, sampler)
    assert "Create Hook Model as LoRA" in text
    assert "Create Hook LoRA" in text, "the remedy"


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeAdd", "LoraSave", "ModelSave"])
def test_with_a_lora_on_it_is_neither_merged_nor_saved(server, loras, node):
    graph = Graph()
    model = with_loras(graph, ours(graph, "TP-2"), (loras["kohya"], 1.0))
    given: dict[str, dict[str, Any]] = {
        "ModelMergeSimple": {"model1": model, "model2": model, "ratio": 0.5},
        "ModelMergeAdd": {"model1": model, "model2": model},
        "LoraSave": {"model_diff": model, "filename_prefix": "saved", "rank": 4, "lora_type": "standard",
                     "bias_diff": True},
        "ModelSave": {"model": model, "filename_prefix": "saved"},
    }  # fmt: skip
    last = graph.add(node, **given[node])
    if node.startswith("ModelMerge"):
        graph.add("PreviewAny", source=last)
    assert "neither merged nor saved" in failure(server, graph, last)


def test_many_files_of_many_kinds(server, loras):
    """16 loaders in a row, of ranks 1, 16 and 256, whose files are in fp32, fp16, bf16 and 8 bits."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    keys, on = list(SHAPES), []
    for number in range(16):
        rank, tensors = (1, 16, 256)[number % 3], {}
        for key in keys[number % 4 :: 4]:
            rows, columns = SHAPES[key]
            tensors[f"{PREFIX}{key.removesuffix('.weight')}.lora_A.weight"] = random(rank, columns) / columns**0.5
            tensors[f"{PREFIX}{key.removesuffix('.weight')}.lora_B.weight"] = 0.02 * random(rows, rank)
        name = f"many-{number}.safetensors"
        dtype = dtypes[number // 4 % 4]
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, server.models / "loras" / name)
        on.append((name, (1.0, -0.5, 3.0)[number % 3] / rank**0.5))
    mine, without, theirs = draw(server, ("TP-2", on), ("TP-2", []), ("stock", on))
    assert relative_error(mine, theirs) <= PARITY
    assert relative_error(mine, without) > 100 * PARITY


def dual(graph: Graph, model: NodeId, other: NodeId, positive: NodeId, negative: NodeId) -> NodeId:
    """A picture of which one MODEL computes the positive pass, and another one the negative."""
    guider = graph.add(
        "DualModelGuider", model=model, model_negative=other, positive=positive, negative=negative, cfg=3.0
    )
    sampler = graph.add(
        "SamplerCustomAdvanced", guider=guider, noise=graph.add("RandomNoise", noise_seed=3),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=graph.add("Flux2Scheduler", steps=2, width=64, height=64),
        latent_image=graph.add("EmptyFlux2LatentImage", width=64, height=64, batch_size=1),
    )  # fmt: skip
    return save_latent(graph, (sampler, 0))


def test_two_of_one_base_in_one_guider(server, loras):
    """A MODEL for each pass, of one base: as stock draws it, where one's LoRA is on in both."""
    graph, saved = Graph(), []
    loader = add_loader(graph)
    prompts = add_prompt(graph, loader), add_prompt(graph, loader, "a cat")
    stock = graph.add("UNETLoader", unet_name=FILE, weight_dtype="default")
    for base in (ours(graph, "TP-2"), stock):
        one, other = (with_loras(graph, base, (loras[style], 0.8)) for style in ("every layer", "kohya"))
        saved += [dual(graph, *models, *prompts) for models in ((one, other), (base, base))]
    result = run_well(server, graph)
    mine, without, theirs, theirs_without = (saved_latent(server, result, node) for node in saved)
    assert relative_error(mine, theirs) <= PARITY
    assert relative_error(without, theirs_without) <= PARITY
    assert relative_error(mine, without) > 100 * PARITY


MERGED = ("every layer", "diffusers", "kohya", "lycoris")
"""Kinds that are a sum of their own; lengths of rows (DoRA) are summed in another order."""


def test_merged_to_the_bit(server, loras, tmp_path):
    """What ComfyUI's own classes make of bf16 weights on a CPU, and what a rank does of the same patches."""
    file = server.models / "diffusion_models" / "lora-bf16.safetensors"
    write(file, {key: tensor.bfloat16() for key, tensor in flux2_tensors(heads=2).items()})
    graph = Graph()
    load = f"m = comfy.sd.load_diffusion_model({str(file)!r}, model_options=dict(dtype=torch.bfloat16))"
    stock = graph.add("ReferenceChange", model=ours(graph, "TP-2", file.name), statements=load)
    asked = []
    for style in MERGED:
        on = [(loras[style], 0.7), (loras["every layer"], -0.3)]
        theirs, mine = tmp_path / f"{style}-theirs", tmp_path / f"{style}-mine"
        asked += [
            (with_loras(graph, stock, *on),
             "m.patch_model() and torch.save({k: v.clone() for k, v in dm.state_dict().items()}, "
             f"{str(theirs)!r}) or m.unpatch_model()"),
            (with_loras(graph, ours(graph, "TP-2", file.name), *on),
             "m._patch(None) or torch.save({k: [vars(p) for p in of] for k, of in "
             f"m.model.remote_part.adapters.patches.items()}}, {str(mine)!r})"),
        ]  # fmt: skip
    look(server, graph, *asked)
    for style in MERGED:
        merged = torch.load(tmp_path / f"{style}-theirs")
        patches = {key: [Patch(**p) for p in of] for key, of in torch.load(tmp_path / f"{style}-mine").items()}
        assert equal_to_the_bit(file, AdapterSet(style, patches), merged) >= 1


def equal_to_the_bit(file: Path, adapters: AdapterSet, merged: Mapping[str, Tensor]) -> int:
    """How many parameters of one rank are changed; AssertionError where one is not as it is merged."""
    mesh = single_mesh("cpu")
    settings = ModelSettings(
        open_checkpoint(file), ParallelismConfig(), mesh, torch.device("cpu"), torch.bfloat16, "cast", AS_IT_IS
    )
    part = TransformerComponent(settings)
    part.load(lambda count: None)
    clean = {name: parameter.data.clone() for name, parameter in part.module.named_parameters()}
    part.adapt(adapters)
    changed = 0
    for name, parameter in part.module.named_parameters():
        pieces = settings.family.transformer.file_rows(name)
        wanted = torch.cat([
            merged[key if key in merged else key.replace(".weight", ".scale")].chunk(parts)[number]
            for key, number, parts in pieces
        ])  # fmt: skip
        assert parameter.dtype == wanted.dtype == torch.bfloat16
        assert torch.equal(parameter.data, wanted), name
        changed += not torch.equal(clean[name], wanted)
    return changed
