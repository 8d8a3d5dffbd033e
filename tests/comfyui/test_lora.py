"""ComfyUI's own LoRA loaders on a parallel MODEL: what stock gives on the same files, and undone to the bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.errors import relative_error
from tests.single_file import flux2_shapes, flux2_tensors, to_fp8, write

from .graphs import Graph, NodeId, add_layout, add_loader, add_prompt, add_sampler, run_well, save_latent, saved_latent
from .processes import worker_ranks
from .server import ComfyServer
from .test_errors import failure

PARITY = 1e-4
HEADS, RANK = 2, 4
FILE = "lora-base.safetensors"
LAYOUTS = {"TP-2": {"ulysses": 1, "tp": 2}, "Ulysses-2": {"ulysses": 2, "tp": 1}}
SHAPES = {key: shape for key, shape in flux2_shapes(heads=HEADS).items() if len(shape) == 2}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def every_layer() -> dict[str, Tensor]:
    """LoRA for each linear under the file's names, q, k and v in one."""
    tensors = {}
    for key, (rows, columns) in SHAPES.items():
        base = f"diffusion_model.{key.removesuffix('.weight')}"
        tensors[f"{base}.lora_A.weight"] = random(RANK, columns) / columns**0.5
        tensors[f"{base}.lora_B.weight"] = random(rows, RANK) * 0.1
    return tensors


def diffusers_names() -> dict[str, Tensor]:
    """Queries alone, of which the file has a third of a weight, and a weight whose halves change places."""
    width = SHAPES["img_in.weight"][0]
    tensors = {}
    for base, rows in (("transformer_blocks.0.attn.to_q", width), ("transformer_blocks.1.attn.add_v_proj", width),
                       ("norm_out.linear", 2 * width)):  # fmt: skip
        tensors[f"transformer.{base}.lora_A.weight"] = random(RANK, width) * 0.2
        tensors[f"transformer.{base}.lora_B.weight"] = random(rows, RANK) * 0.2
    return tensors


def kohya() -> dict[str, Tensor]:
    """With an alpha, in bf16, of blocks of both kinds."""
    tensors = {}
    for key in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "single_blocks.0.linear2"):
        rows, columns = SHAPES[f"{key}.weight"]
        base = f"lora_unet_{key.replace('.', '_')}"
        tensors[f"{base}.lora_down.weight"] = random(RANK, columns).bfloat16()
        tensors[f"{base}.lora_up.weight"] = (random(rows, RANK) * 0.1).bfloat16()
        tensors[f"{base}.alpha"] = torch.tensor(2.0)
    return tensors


def lycoris() -> dict[str, Tensor]:
    """LoHa, LoKr with one factor in two, and a plain difference, also of a norm."""
    rows, columns = SHAPES["double_blocks.0.txt_mlp.0.weight"]
    loha, lokr = "diffusion_model.double_blocks.0.txt_mlp.0", "diffusion_model.single_blocks.2.linear2"
    tensors = {
        f"{loha}.hada_w1_a": random(rows, RANK) * 0.3,
        f"{loha}.hada_w1_b": random(RANK, columns) * 0.3,
        f"{loha}.hada_w2_a": random(rows, 3) * 0.3,
        f"{loha}.hada_w2_b": random(3, columns) * 0.3,
        f"{loha}.alpha": torch.tensor(2.0),
    }
    rows, columns = SHAPES["single_blocks.2.linear2.weight"]
    tensors |= {
        f"{lokr}.lokr_w1": random(4, 8) * 0.2,
        f"{lokr}.lokr_w2_a": random(rows // 4, RANK) * 0.2,
        f"{lokr}.lokr_w2_b": random(RANK, columns // 8) * 0.2,
        f"{lokr}.alpha": torch.tensor(1.0),
    }
    rows, columns = SHAPES["double_blocks.1.img_attn.proj.weight"]
    tensors["diffusion_model.double_blocks.1.img_attn.proj.diff"] = random(rows, columns) * 0.05
    return tensors


def lengths() -> dict[str, Tensor]:
    """DoRA of rows and of columns, of a fused weight's queries alone, too; GLoRA of both forms; OFT."""
    tensors: dict[str, Tensor] = {}
    row, column = "double_blocks.0.img_mlp.0", "single_blocks.1.linear2"
    for key, axis in ((row, 0), (column, 1)):
        rows, columns = shape = SHAPES[f"{key}.weight"]
        tensors |= low_rank(f"diffusion_model.{key}", rows, columns)
        of = [1, 1]
        of[axis] = shape[axis]
        tensors[f"diffusion_model.{key}.dora_scale"] = 1 + 0.3 * random(*of)
        tensors[f"diffusion_model.{key}.alpha"] = torch.tensor(2.0)
    width = SHAPES["img_in.weight"][0]
    queries = "transformer.transformer_blocks.1.attn.to_q"
    tensors |= low_rank(queries, width, width) | {f"{queries}.dora_scale": 1 + 0.3 * random(1, width)}
    for key, old in (("double_blocks.1.txt_mlp.2", False), ("single_blocks.0.linear1", True)):
        (rows, columns), base = SHAPES[f"{key}.weight"], f"diffusion_model.{key}"
        inner, outer = random(columns, RANK) * 0.05, random(RANK, columns)
        up, down = random(rows, RANK) * 0.05, random(RANK, columns)
        for name, tensor in zip(("a1", "a2", "b1", "b2"), (outer, inner, down, up) if old else (inner, outer, up, down),
                                strict=True):  # fmt: skip
            tensors[f"{base}.{name}.weight"] = tensor
    for key, size in (("double_blocks.1.img_attn.qkv", 48), ("double_blocks.1.img_attn.proj", 32)):
        blocks = SHAPES[f"{key}.weight"][0] // size
        tensors[f"diffusion_model.{key}.oft_blocks"] = random(blocks, size, size) * 0.1
        tensors[f"diffusion_model.{key}.alpha"] = torch.tensor(3.0)
    return tensors


def low_rank(base: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {
        f"{base}.lora_A.weight": random(RANK, columns) / columns**0.5,
        f"{base}.lora_B.weight": random(rows, RANK) * 0.1,
    }


STYLES = {
    "every layer": every_layer,
    "diffusers": diffusers_names,
    "kohya": kohya,
    "lycoris": lycoris,
    "lengths": lengths,
}


@pytest.fixture(scope="module")
def loras(server: ComfyServer) -> dict[str, str]:
    """The base model, and LoRA files by style."""
    folder, models = server.models / "loras", server.models / "diffusion_models"
    for place in (folder, models):
        place.mkdir(parents=True, exist_ok=True)
    write(models / FILE, flux2_tensors(heads=HEADS))
    for name, make in STYLES.items():
        save_file(make(), folder / f"{name}.safetensors")
    return {name: f"{name}.safetensors" for name in STYLES}


def with_loras(graph: Graph, model: NodeId, *files: tuple[str, float]) -> NodeId:
    for file, strength in files:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=strength)
    return model


def ours(graph: Graph, layout: str, file: str = FILE) -> NodeId:
    degrees = add_layout(graph, **LAYOUTS[layout])
    return graph.add("HybridDiT_LoadDiffusionModel", unet_name=file, layout=degrees, weight_dtype="default")


def draw(server: ComfyServer, *models: tuple[str, list[tuple[str, float]]], file: str = FILE) -> list[Tensor]:
    """The latents of several MODELs in one prompt: a layout, or "stock", each with LoRAs."""
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    saved = []
    for layout, files in models:
        model = ours(graph, layout, file) if layout != "stock" else graph.add(
            "UNETLoader", unet_name=file, weight_dtype="default")  # fmt: skip
        model = with_loras(graph, model, *files)
        saved.append(save_latent(graph, add_sampler(graph, model, model=model, positive=positive)))
    result = run_well(server, graph)
    return [saved_latent(server, result, latent) for latent in saved]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_as_stock(server, loras, style, layout):
    """Alternating in one prompt with the model as it is, which comes back to the bit."""
    on = [(loras[style], 0.8)]
    before, with_it, after, theirs = draw(server, (layout, []), (layout, on), (layout, []), ("stock", on))
    assert relative_error(with_it, theirs) <= PARITY
    assert relative_error(with_it, before) > 100 * PARITY
    assert torch.equal(after, before)


def test_several_and_other_strengths(server, loras):
    several = [(loras["every layer"], 0.5), (loras["kohya"], -1.0), (loras["diffusers"], 3.0)]
    changed = [(loras["every layer"], 1.0), *several[1:]]
    first, second, theirs, theirs_changed = draw(
        server, ("TP-2", several), ("TP-2", changed), ("stock", several), ("stock", changed)
    )
    assert relative_error(first, theirs) <= PARITY
    assert relative_error(second, theirs_changed) <= PARITY
    assert relative_error(first, second) > 100 * PARITY


def test_it_lasts(server, loras):
    """After its group was killed, and after ComfyUI has asked for all memory."""
    on = [(loras["kohya"], 1.0)]
    (wanted,) = draw(server, ("TP-2", on))
    for process in worker_ranks(server):
        os.kill(process, signal.SIGKILL)
    server.post("/free", {"unload_models": False, "free_memory": True})
    (again,) = draw(server, ("TP-2", on))
    assert torch.equal(again, wanted)
    server.post("/free", {"unload_models": True, "free_memory": True})
    (again,) = draw(server, ("TP-2", on))
    assert torch.equal(again, wanted)


def test_beside_weights_in_8_bits(server, loras):
    """Nearer to the file's own values with the LoRA than stock, which rounds the sum to 8 bits again."""
    stored, metadata = to_fp8(flux2_tensors(heads=HEADS), "metadata")
    write(server.models / "diffusion_models" / "lora-fp8.safetensors", stored, metadata=metadata)
    write(server.models / "diffusion_models" / "lora-exact.safetensors", exactly(stored))
    on = [(loras["every layer"], 0.3), (loras["diffusers"], 1.0)]
    plain, with_it = draw(server, ("TP-2", []), ("TP-2", on), file="lora-fp8.safetensors")
    (rounded,) = draw(server, ("stock", on), file="lora-fp8.safetensors")
    (exact,) = draw(server, ("stock", on), file="lora-exact.safetensors")
    assert relative_error(with_it, exact) < 0.2 * relative_error(rounded, exact)
    assert relative_error(with_it, plain) > 10 * relative_error(with_it, exact)
    assert torch.equal(*draw(server, ("TP-2", []), ("TP-2", []), file="lora-fp8.safetensors"))


def exactly(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file's weights stand for."""
    scales = {key.removesuffix("_scale"): value for key, value in stored.items() if key.endswith(".weight_scale")}
    return {
        key: tensor.float() * scales.get(key, torch.tensor(1.0))
        for key, tensor in stored.items()
        if not key.endswith(".weight_scale")
    }


def refusal(server: ComfyServer, name: str, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, server.models / "loras" / f"{name}.safetensors")
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    model = with_loras(graph, ours(graph, "TP-2"), (f"{name}.safetensors", 1.0))
    save_latent(graph, add_sampler(graph, model, model=model, positive=positive))
    return failure(server, graph, model)


def test_what_cannot_be_is_refused_at_the_loader(server, loras):
    key = "double_blocks.0.img_attn.proj"
    layer, (rows, columns) = f"diffusion_model.{key}", SHAPES[f"{key}.weight"]
    good = {f"{layer}.lora_A.weight": random(RANK, columns), f"{layer}.lora_B.weight": random(rows, RANK)}
    text = refusal(server, "boft", {f"{layer}.oft_blocks": random(2, 8, 32, 32), f"{layer}.alpha": torch.ones(())})
    assert f"{key}.weight is changed by BOFT" in text
    assert "LoRA, LoCon, LoHa, LoKr" in text
    text = refusal(server, "wide", good | {f"{layer}.lora_A.weight": random(RANK, columns + 8)})
    assert "1 of 1 weights that the LoRA changes have another size" in text
    assert f"[{rows}, {columns + 8}], the model [{rows}, {columns}]" in text
    other = {name.replace(key, "blocks.0.self_attn.q"): tensor for name, tensor in good.items()}
    assert "for another model" in refusal(server, "other", other)


def test_numbers_that_are_none_are_refused(server, loras):
    layer = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{layer}.lora_A.weight": random(RANK, 256), f"{layer}.lora_B.weight": random(256, RANK)}
    tensors[f"{layer}.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, server.models / "loras" / "nan.safetensors")
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    model = with_loras(graph, ours(graph, "TP-2"), ("nan.safetensors", 1.0))
    sampler = add_sampler(graph, model, model=model, positive=positive)
    save_latent(graph, sampler)
    assert "double_blocks.0.img_attn.proj.weight holds values that are not finite" in failure(server, graph, sampler)
    before, after = draw(server, ("TP-2", []), ("TP-2", [(loras["kohya"], 1.0)]))
    assert relative_error(before, after) > 100 * PARITY
