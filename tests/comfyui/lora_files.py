"""LoRA files in every form that ComfyUI reads, made at random, and pictures with them by ours and by stock models."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.single_file import flux2_shapes, flux2_tensors, write

from .graphs import Graph, NodeId, add_layout, add_loader, add_prompt, add_sampler, run_well, save_latent, saved_latent
from .server import ComfyServer

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


def other_names() -> dict[str, Tensor]:
    """Names of diffusers' layers behind nothing, as peft calls its first adapter, and behind two more prefixes."""
    width = SHAPES["img_in.weight"][0]
    tensors = {}
    for base in ("transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_out.0"):
        tensors[f"{base}.lora_A.default.weight"] = random(RANK, width) * 0.2
        tensors[f"{base}.lora_B.default.weight"] = random(width, RANK) * 0.2
    for base in ("lycoris_transformer_blocks_0_attn_add_q_proj", "lora_transformer_transformer_blocks_1_attn_to_v"):
        tensors[f"{base}.lora_down.weight"] = random(RANK, width) * 0.2
        tensors[f"{base}.lora_up.weight"] = random(width, RANK) * 0.2
        tensors[f"{base}.alpha"] = torch.tensor(2.0)
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
    "other names": other_names,
    "kohya": kohya,
    "lycoris": lycoris,
    "lengths": lengths,
}


def write_loras(server: ComfyServer) -> dict[str, str]:
    """The base model, and LoRA files by style."""
    folder, models = server.models / "loras", server.models / "diffusion_models"
    for place in (folder, models):
        place.mkdir(parents=True, exist_ok=True)
    if not (models / FILE).exists():
        write(models / FILE, flux2_tensors(heads=HEADS))
    for name, make in STYLES.items():
        save_file(make(), folder / f"{name}.safetensors")
    return {name: f"{name}.safetensors" for name in STYLES}


def write_tiny_lora(server: ComfyServer) -> str:
    """A LoRA that changes the tiny pipeline a lot."""
    generator = torch.Generator().manual_seed(0)
    base = "diffusion_model.double_blocks.0.img_attn.proj"
    weights = {
        f"{base}.lora_A.weight": torch.randn(4, 128, generator=generator),
        f"{base}.lora_B.weight": torch.randn(128, 4, generator=generator),
    }
    folder = server.models / "loras"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "tiny-lora.safetensors")
    return "tiny-lora.safetensors"


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
