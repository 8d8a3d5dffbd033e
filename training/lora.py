"""Trains a LoRA for the demo pipeline: scenes in outlines instead of filled shapes, for the same prompts.

``python -m training.lora PIPELINE --out outline.safetensors`` takes two minutes on one GPU; the file has the names that
ComfyUI gives FLUX.2's layers, as most LoRAs in circulation do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Pipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .data import encode_bucket, make_texts
from .models import encode_text
from .recipe import SMOKE, Recipe, say
from .trainer import Trainer

RANK = 8
RECIPE = Recipe(seed=5, chunks=(12, 1, 0), short_steps=1500, full_steps=150, short_batch=96, full_batch=48, lr=1e-3)

DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
}
"""ComfyUI's layer to the diffusers layers whose rows it stacks, in double stream blocks."""

SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}


class LowRank(nn.Module):
    """``W + B A``, with ``B`` zero at first (Hu et al., 2021)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(RANK, columns, device=weight.device) * columns**-0.5)
        self.b = nn.Parameter(torch.zeros(rows, RANK, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_low_rank(transformer: Any) -> dict[str, list[LowRank]]:
    """Parametrize the layers of ``DOUBLE`` and ``SINGLE``; what was added, by ComfyUI's name of the layer."""
    added: dict[str, list[LowRank]] = {}
    for theirs, blocks, layers in (
        ("double_blocks", transformer.transformer_blocks, DOUBLE),
        ("single_blocks", transformer.single_transformer_blocks, SINGLE),
    ):
        for index, block in enumerate(blocks):
            for name, parts in layers.items():
                modules = [block.get_submodule(part) for part in parts]
                pairs = [LowRank(module.weight) for module in modules]
                for module, pair in zip(modules, pairs, strict=True):
                    parametrize.register_parametrization(module, "weight", pair)
                added[f"diffusion_model.{theirs}.{index}.{name}"] = pairs
    return added


def to_file(added: dict[str, list[LowRank]]) -> dict[str, Tensor]:
    """The tensors of a LoRA file; layers that stack several have the pairs on a diagonal, at several times the rank."""
    out = {}
    for name, pairs in added.items():
        out[f"{name}.lora_A.weight"] = torch.cat([pair.a for pair in pairs])
        out[f"{name}.lora_B.weight"] = torch.block_diag(*(pair.b for pair in pairs))
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0, help="of training (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps on any machine")
    args = parser.parse_args()
    recipe = SMOKE if args.smoke else RECIPE
    pipeline = Flux2Pipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    texts = make_texts(pipeline.tokenizer, recipe.seed, (recipe.chunks[0], recipe.chunks[1], 0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.transformer):
        model.to(device).requires_grad_(False)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    buckets = [encode_bucket(pipeline.vae, key, group, device, outlined=True) for key, group in texts.items()]
    say("outlines encoded")
    added = add_low_rank(pipeline.transformer)
    named = {f"{n}.{i}.{m}": p for n, ps in added.items() for i, q in enumerate(ps) for m, p in q.named_parameters()}
    trainer = Trainer(recipe, pipeline.transformer, pipeline.text_encoder, encode_text, device, named)
    trainer.run(buckets, args.minutes * 60, finish=True)
    trainer.write_average()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(to_file(added), args.out, metadata={"format": "pt", "base_model": "flux2-demo", "style": "outline"})
    say(f"{args.out}: {args.out.stat().st_size / 2**20:.2f} MiB, {trainer.step} steps")


if __name__ == "__main__":
    main()
