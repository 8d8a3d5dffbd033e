"""Trains the demo pipeline on one GPU: first the VAE, then the text encoder alone, then transformer and text encoder.

``python -m training.train --out RUN`` does one stretch of at most ``--minutes`` and leaves its state in RUN; repeat it
until it says "done", which writes RUN/pipeline. The state travels in parts of less than 16 MiB.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import torch

from .data import Texts, encode_bucket, make_texts
from .models import build_text_encoder, build_tokenizer, build_transformer, build_vae, encode_text, save_pipeline
from .reader import train_reader
from .recipe import SMOKE, T0, Recipe, say
from .trainer import Trainer
from .vae import train_vae

PART = 15 * 2**20


def save_state(folder: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("state.*"):
        old.unlink()
    for index in range(0, len(data), PART):
        (folder / f"state.{index // PART:02d}").write_bytes(data[index : index + PART])


def write_state(folder: Path, trainer: Trainer, vae: Any) -> int:
    # In bfloat16, as the pipeline will be: half the size to carry around.
    average = {n: t.to("cpu", torch.bfloat16) for n, t in trainer.average.items()}
    vae_weights = {n: t.cpu() for n, t in vae.state_dict().items()}
    save_state(folder, {"step": trainer.step, "average": average, "vae": vae_weights})
    return trainer.step


def load_state(folder: Path) -> dict[str, Any] | None:
    parts = sorted(folder.glob("state.*"))
    if not parts:
        return None
    return torch.load(io.BytesIO(b"".join(part.read_bytes() for part in parts)), map_location="cpu", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the state and, at the end, the pipeline")
    parser.add_argument("--minutes", type=float, default=8.5, help="length of this stretch (default: %(default)s)")
    parser.add_argument("--finish", action="store_true", help="squeeze all steps that are left into this stretch")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs, should they fail")
    parser.add_argument("--export", action="store_true", help="only write the pipeline from the state there is")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps on any machine")
    parser.add_argument("--set", type=json.loads, default={}, help="changes of the recipe, as JSON")
    args = parser.parse_args()
    recipe = Recipe(**{**(SMOKE if args.smoke else Recipe()).__dict__, **args.set})
    device = torch.device("cuda" if torch.cuda.is_available() and not args.export else "cpu")

    tokenizer = build_tokenizer()
    state = load_state(args.out)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    text_encoder, transformer = build_text_encoder(tokenizer), build_transformer()
    if args.export:
        if state is None:
            raise SystemExit(f"there is no state in {args.out}")
        vae = build_vae()
        vae.load_state_dict(state["vae"])
        trainer = Trainer(recipe, transformer, text_encoder, encode_text, device)
        trainer.resume(state["average"], state["step"])
        save_pipeline(args.out / "pipeline", tokenizer, text_encoder, vae, transformer)
        return

    # Each stretch draws other scenes.
    texts = make_texts(tokenizer, recipe.seed + (state["step"] if state else 0), recipe.chunks)
    main_key = next(iter(texts))
    if args.smoke:
        texts = {key: Texts(*(a if a is None else a[:8] for a in vars(group).values())) for key, group in texts.items()}
    say(f"{sum(len(t.scenes) for t in texts.values())} scenes described")
    if state is None:
        scenes = torch.from_numpy(texts[main_key].scenes[:20000]).to(device)
        vae = train_vae(recipe, scenes, device, seconds=110)
    else:
        vae = build_vae().to(device).to(memory_format=torch.channels_last)
        vae.load_state_dict(state["vae"])
        vae.eval().requires_grad_(False)
    encoder = copy.deepcopy(vae).to(torch.bfloat16) if device.type == "cuda" else vae
    encoder.bn.float()
    buckets = [encode_bucket(encoder, key, group, device) for key, group in texts.items()]
    if device.type == "cuda":
        torch.cuda.synchronize()
    say("scenes encoded")

    text_encoder, transformer = text_encoder.to(device), transformer.to(device)
    encode = encode_text
    if device.type == "cuda":
        # dynamic=True from the start took 100 s to compile on an H100; one size first and then all takes 80 s.
        encode = torch.compile(encode_text)
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile()
    if state is None:
        train_reader(recipe, text_encoder, encode, texts[main_key], device)
    del texts
    trainer = Trainer(recipe, transformer, text_encoder, encode, device)
    if state is not None:
        trainer.resume(state["average"], state["step"])
    trainer.use_graphs &= not args.no_graphs
    try:
        done = trainer.run(buckets, args.minutes * 60 - (time.time() - T0) - 8, args.finish)
    except BaseException:
        write_state(args.out, trainer, vae)
        raise
    step = write_state(args.out, trainer, vae)
    trainer.write_average()
    save_pipeline(args.out / "pipeline", tokenizer, text_encoder, vae, transformer)
    say(f"done, {step} steps" if done else f"stopped at step {step}; run again")


if __name__ == "__main__":
    main()
