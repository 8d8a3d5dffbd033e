"""Measures a pipeline folder: held-out prompts drawn under both hosts' conventions, and edits, judged by the checker.

``python -m training.evaluate FOLDER --report REPORT.json --sheet SHEET.webp`` takes seconds on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image, ImageDraw
from torch import Tensor

from .checker import Verdict, _templates, judge, rates
from .models import TEXT_LENGTH, image_ids, text_ids, tokenize
from .render import render_scenes
from .scenes import Caption, Scene, describe, edit, sample_scene

STEPS = 8
GUIDANCE = 4.0
COMFY_SHIFT = 2.02
SHEET_SIZES = ((192, 320), (320, 192), (256, 384))


def held_out(count: int, seed: int = 77, height: int = 256, width: int = 256) -> list[tuple[Scene, Caption]]:
    """Scenes whose combination of things and background training never saw, with plain captions."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, height, width, held_out=True) for _ in range(count)]
    return [(scene, describe(rng, scene, noise=False)) for scene in scenes]


def comfy_context(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """What ComfyUI hands to the transformer: each prompt encoded without padding, then padded with zeros in front."""
    rows = []
    for ids in tokenize(pipeline.tokenizer, prompts):
        tokens = torch.tensor([ids], device=pipeline.text_encoder.device)
        states = pipeline.text_encoder(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True, use_cache=False
        ).hidden_states
        row = torch.cat([states[k] for k in pipeline.text_encoder.config.text_encoder_out_layers], dim=-1)
        rows.append(torch.nn.functional.pad(row, (0, 0, TEXT_LENGTH - row.shape[1], 0)))
    return torch.cat(rows)


def comfy_sigmas(steps: int) -> list[float]:
    """KSampler's "simple" schedule of FLUX.2's shift, the final zero included."""
    scale = math.exp(COMFY_SHIFT)
    return [scale / (scale + steps / (steps - k) - 1) for k in range(steps)] + [0.0]


def diffusers_sigmas(steps: int, tokens: int) -> list[float]:
    scale = math.exp(compute_empirical_mu(tokens, steps))
    return [scale / (scale + 1 / t - 1) for t in np.linspace(1.0, 1 / steps, steps)] + [0.0]


@torch.no_grad()
def sample(pipeline: Any, context: Tensor, height: int, width: int, sigmas: list[float], seed: int,
           guidance: float = GUIDANCE) -> list[np.ndarray]:  # fmt: skip
    """Euler's method over ``sigmas``, as KSampler's "euler" does, and the pictures as uint8."""
    transformer, vae = pipeline.transformer, pipeline.vae
    device, dtype = transformer.device, transformer.dtype
    h, w = height // 16, width // 16
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(context.shape[0], h * w, 128, generator=generator).to(device)
    for sigma, following in pairwise(sigmas):
        velocity = transformer(
            hidden_states=x.to(dtype),
            encoder_hidden_states=context.to(dtype),
            timestep=torch.full((len(x),), sigma, device=device, dtype=dtype),
            guidance=torch.full((len(x),), guidance, device=device, dtype=dtype),
            img_ids=image_ids(h, w, 0, device),
            txt_ids=text_ids(TEXT_LENGTH, device),
            return_dict=False,
        )[0]
        x = x + (following - sigma) * velocity.float()
    latents = x.transpose(1, 2).unflatten(2, (h, w))
    std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
    latents = latents * std.view(1, -1, 1, 1) + vae.bn.running_mean.float().view(1, -1, 1, 1)
    return to_uint8(vae.decode(Flux2Pipeline._unpatchify_latents(latents).to(vae.dtype), return_dict=False)[0])


def to_uint8(pictures: Tensor) -> list[np.ndarray]:
    pictures = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(pictures.permute(0, 2, 3, 1).cpu().numpy())


def draw(pipeline: Any, prompts: Sequence[str], height: int, width: int, seed: int, steps: int = STEPS,
         guidance: float = GUIDANCE, image: Any = None) -> list[np.ndarray]:  # fmt: skip
    """The pictures of diffusers' own pipeline."""
    layers = tuple(pipeline.text_encoder.config.text_encoder_out_layers)
    out: list[np.ndarray] = []
    for start in range(0, len(prompts), 50):
        pictures = pipeline(
            prompt=list(prompts[start : start + 50]), image=image, height=height, width=width,
            num_inference_steps=steps, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed + start), output_type="np",
            text_encoder_out_layers=layers,
        ).images  # fmt: skip
        out += list((pictures * 255).round().astype(np.uint8))
    return out


def verdicts(pictures: Sequence[np.ndarray], cases: Sequence[tuple[Scene, Caption]]) -> list[Verdict]:
    _templates()  # before the fork: torch in a forked process may wait for threads that are not there
    scenes, captions = zip(*cases, strict=True)
    if len(cases) < 30:
        return [judge(*each) for each in zip(pictures, scenes, captions, strict=True)]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        return list(pool.map(judge, pictures, scenes, captions, chunksize=8))


def truth(cases: Sequence[tuple[Scene, Caption]]) -> list[np.ndarray]:
    return [to_uint8(render_scenes([scene]))[0] for scene, _ in cases]


def edit_cases(count: int) -> list[tuple[Scene, Scene, str]]:
    rng = random.Random(78)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, *edit(rng, scene)) for scene in scenes]


def all_things(scene: Scene) -> Caption:
    """Claims that all of ``scene`` is there and, as to edits, that it stayed where it was."""
    places = tuple((i, *t.place) for i, t in enumerate(scene.things) if t.place is not None)
    return Caption("", tuple(range(len(scene.things))), places=places)


def contact_sheet(pictures: Sequence[tuple[str, np.ndarray]], columns: int = 6) -> Image.Image:
    """Pictures with their prompts below."""
    cell, text = 256, 44
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (prompt, array) in enumerate(pictures):
        x, y = index % columns * (cell + 8) + 4, index // columns * (cell + text) + 4
        picture = Image.fromarray(array)
        picture.thumbnail((cell, cell))
        sheet.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
        words, line, lines = prompt.split(), "", []
        for word in words:
            if pen.textlength(f"{line} {word}") > cell:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        pen.multiline_text((x, y + cell + 1), "\n".join([*lines, line][:3]), fill="black", spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to write 24 pictures with their prompts")
    parser.add_argument("--quick", action="store_true", help="only the main figures")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    begin = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = Flux2Pipeline.from_pretrained(args.folder, torch_dtype=getattr(torch, args.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    cases = held_out(args.count)
    prompts = [caption.text for _, caption in cases]
    report: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "prompts": args.count}

    def note(name: str, pictures: Sequence[np.ndarray], wanted: Sequence[tuple[Scene, Caption]]) -> None:
        report[name] = {k: round(v, 2) for k, v in rates(verdicts(pictures, wanted)).items()}
        print(f"[{time.time() - begin:4.0f}] {name}: {report[name]}", flush=True)
        if args.report:
            args.report.write_text(json.dumps(report, indent=2) + "\n")

    note("truth", truth(cases), cases)
    with torch.no_grad():
        context = torch.cat([comfy_context(pipeline, prompts[k : k + 50]) for k in range(0, len(prompts), 50)])
    few, some = cases[:64], context[:64]
    comfy = sample(pipeline, context, 256, 256, comfy_sigmas(STEPS), seed=1)
    note("comfyui", comfy, cases)
    note("diffusers", draw(pipeline, prompts, 256, 256, seed=1), cases)
    edits = edit_cases(12 if args.quick else 40)
    edited, wanted = [], []
    for index, (before, after, words) in enumerate(edits):
        source = Image.fromarray(to_uint8(render_scenes([before]))[0])
        edited += draw(pipeline, [words], 256, 256, seed=index, image=source)
        wanted.append((after, all_things(after)))
    note("edits", edited, wanted)
    if args.sheet:
        chosen = list(zip(prompts[:9], comfy[:9], strict=True))
        for index, size in enumerate(SHEET_SIZES * 3):
            ((_, caption),) = held_out(1, 500 + index, *size)
            chosen.append((caption.text, draw(pipeline, [caption.text], *size, seed=index)[0]))
        for (before, _, words), picture in list(zip(edits, edited, strict=True))[:3]:
            chosen += [("(reference)", to_uint8(render_scenes([before]))[0]), (words, picture)]
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(chosen).save(args.sheet, quality=88)
    if not args.quick:
        note(
            "comfyui context, diffusers schedule",
            sample(pipeline, context, 256, 256, diffusers_sigmas(STEPS, 256), 2),
            cases,
        )
        for guidance in (1.0, 10.0):
            note(
                f"comfyui, guidance {guidance:g}",
                sample(pipeline, some, 256, 256, comfy_sigmas(STEPS), 3, guidance),
                few,
            )
        note("comfyui, 20 steps", sample(pipeline, some, 256, 256, comfy_sigmas(20), 1), few)
        for height, width in ((192, 320), (384, 256), (192, 192), (384, 384)):
            others = held_out(32, 79, height, width)
            texts = [caption.text for _, caption in others]
            note(f"diffusers {height}x{width}", draw(pipeline, texts, height, width, seed=4), others)


if __name__ == "__main__":
    main()
