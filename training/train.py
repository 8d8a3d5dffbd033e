"""Trains the demo pipeline on one GPU: first the VAE, then the text encoder alone, then transformer and text encoder.

``python -m training.train --out RUN`` does one stretch of at most ``--minutes`` and leaves its state in RUN; repeat it
until it says "done", which writes RUN/pipeline. The state travels in parts of less than 16 MiB.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import CONTEXT, Bucket, Texts, encode_bucket, encode_pictures, make_texts
from .models import (
    LATENT_CHANNELS,
    SIZE,
    TEXT_LENGTH,
    USED,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    empty_unused_channels,
    encode_padded,
    encode_text,
    image_ids,
    save_pipeline,
    text_ids,
)
from .muon import Muon
from .render import SLOTS, render
from .scenes import COLOUR_NAMES, SHAPES

FULL_COST = 2.4
"""How much longer a step with the full context takes."""

PART = 15 * 2**20
T0 = time.time()


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 1
    chunks: tuple[int, int, int] = (80, 3, 12)
    vae_steps: int = 2600
    vae_batch: int = 128
    vae_lr: float = 2e-3
    text_steps: int = 1500
    text_batch: int = 1024
    short_steps: int = 16000
    """Steps with contexts of `CONTEXT` tokens; then come `full_steps` with all 512, as they are in use."""
    full_steps: int = 2400
    short_batch: int = 160
    full_batch: int = 128
    lr: float = 1.5e-3
    decay: float = 0.4
    """The part at the end in which the learning rate goes down to zero."""
    ema: float = 0.998


SMOKE = Recipe(
    chunks=(1, 1, 1), vae_steps=3, vae_batch=4, text_steps=3, text_batch=8, short_steps=3, full_steps=2, short_batch=4,
    full_batch=2,
)  # fmt: skip


def say(*words: Any) -> None:
    print(f"[{time.time() - T0:5.0f}]", *words, flush=True)


# The VAE.


def train_vae(recipe: Recipe, scenes: Tensor, device: Any, seconds: float) -> Any:
    """Reconstruct windows of 128 x 128 around shapes; the latents' statistics become the batch norm's."""
    torch.manual_seed(recipe.seed)
    vae = build_vae().to(device).to(memory_format=torch.channels_last)
    empty_unused_channels(vae)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.vae_lr, betas=(0.9, 0.98), weight_decay=1e-4)
    window, begin = 128, time.time()
    for step in range(recipe.vae_steps):
        # A slow machine stops in time, with the learning rate at its end.
        progress = max(step / recipe.vae_steps, (time.time() - begin) / seconds)
        if progress >= 1:
            break
        rate = recipe.vae_lr * min(1, (step + 1) / 100) * min(1, 2 * (1 - progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        part = scenes[torch.randint(len(scenes), (recipe.vae_batch,), device=device)]
        corner = torch.rand(recipe.vae_batch, 2, device=device)
        corner = (part[:, 1, 1:3] - corner * window).clamp(0, 256 - window).floor()
        picture = render(part, window, window, corner)[0].contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(picture).latent_dist
            mean, deviation = posterior.mean[:, :LATENT_CHANNELS].float(), posterior.std[:, :LATENT_CHANNELS].float()
            latent = mean + deviation * torch.randn_like(mean)
            out = vae.decode(F.pad(latent, (0, 0, 0, 0, 0, 32 - LATENT_CHANNELS))).sample.float()
        divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).mean()
        error = F.mse_loss(out, picture)
        loss = F.l1_loss(out, picture) + error + 2e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        empty_unused_channels(vae)
        if step % 500 == 0:
            say(f"vae {step} psnr {(10 * (4 / error).log10()).item():.1f} kl {divergence.item():.2f}")
    say(f"vae trained: {step + 1} steps")
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        for tensor in vae.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())  # what the folder will hold, so that latents fit it exactly
        latents, errors = [], []
        for start in range(0, min(1024, len(scenes)), 64):
            picture = render(scenes[start : start + 64], 256, 256)[0]
            latents.append(encode_pictures(vae, picture).flatten(0, 1))
            if start < 256:
                out = vae.decode(vae.encode(picture).latent_dist.mode()).sample.clamp(-1, 1)
                errors.append((out - picture).square().mean((1, 2, 3)))
        flat = torch.cat(latents)
        vae.bn.running_mean.copy_(flat.mean(0).bfloat16())
        vae.bn.running_var.copy_(flat.var(0).bfloat16())
        say(f"vae psnr at 256: {(10 * (4 / torch.cat(errors)).log10()).mean().item():.2f} dB, "
            f"latent std {flat.std(0)[:USED].min().item():.2f}..{flat.std(0).max().item():.2f}")  # fmt: skip
    return vae


# The text encoder.


class Reader(nn.Module):
    """Says from the context's last token what a caption says; only there to give the text encoder a start."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (len(SHAPES) + 1, len(COLOUR_NAMES) + 1, 3)
        slots = SLOTS * sum(self.sizes) + len(COLOUR_NAMES)
        self.net = nn.Sequential(
            nn.RMSNorm(3 * SIZE.text_hidden), nn.Linear(3 * SIZE.text_hidden, 512), nn.SiLU(), nn.Linear(512, slots)
        )

    def loss(self, context: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(context[:, -1]).float()
        background, slots = out[:, : len(COLOUR_NAMES)], out[:, len(COLOUR_NAMES) :].unflatten(1, (SLOTS, -1))
        shape, colour, box = slots.split(self.sizes, dim=-1)
        known = labels[:, 1:, 0] < len(SHAPES)
        loss = F.cross_entropy(shape.flatten(0, 1), labels[:, 1:, 0].flatten().long())
        loss = loss + F.cross_entropy(colour.flatten(0, 1), labels[:, 1:, 1].flatten().long())
        loss = loss + F.cross_entropy(background, labels[:, 0, 1].long(), ignore_index=-1)
        error = ((box - labels[:, 1:, 2:]).abs() * known[..., None]).sum() / known.sum() / 3
        right = (shape.argmax(-1) == labels[:, 1:, 0]) & (colour.argmax(-1) == labels[:, 1:, 1])
        return loss + 8 * error, torch.stack([right.float().mean(), error])


def train_reader(recipe: Recipe, text_encoder: Any, encode: Any, texts: Texts, device: Any) -> None:
    ids, lengths, labels = (
        torch.from_numpy(a).flatten(0, 1).to(device) for a in (texts.ids, texts.lengths, texts.labels)
    )
    reader = Reader().to(device)
    parameters = [*used_text_parameters(text_encoder).values(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(recipe.text_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / recipe.text_steps))
        rows = torch.randint(len(ids), (recipe.text_batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, quality = reader.loss(encode(text_encoder, ids[rows].long(), lengths[rows].long()), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 500 == 0 or step == recipe.text_steps - 1:
            say(
                f"reader {step} loss {loss.item():.3f} shape+colour {quality[0].item():.4f} box {quality[1].item():.4f}"
            )


def used_text_parameters(text_encoder: Any) -> dict[str, nn.Parameter]:
    """Those that reach the transformer: not the last block's, the head's or the vision tower's."""
    model = text_encoder.model.language_model
    found = {f"embed_tokens.{n}": p for n, p in model.embed_tokens.named_parameters()}
    for index, layer in enumerate(model.layers[: max(SIZE.text_out_layers)]):
        found |= {f"layers.{index}.{n}": p for n, p in layer.named_parameters()}
    return found


# The transformer.


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return name.startswith(("transformer.transformer_blocks.", "transformer.single_")) and parameter.ndim == 2


def _fused_rows(name: str, parameter: Tensor) -> list[int]:
    width = SIZE.heads * SIZE.head_dim
    if name.endswith("to_qkv_mlp_proj.weight"):
        return [width] * 3 + [3 * width] * 2
    if name.endswith("linear_in.weight"):
        return [3 * width] * 2
    return [parameter.shape[0]]


class Trainer:
    """Transformer and text encoder with optimizer and moving averages."""

    def __init__(self, recipe: Recipe, transformer: Any, text_encoder: Any, encode: Any, device: Any) -> None:
        self.recipe, self.device, self.encode = recipe, device, encode
        self.transformer, self.text_encoder = transformer, text_encoder
        named = {f"transformer.{n}": p for n, p in transformer.named_parameters()}
        named |= {f"text.{n}": p for n, p in used_text_parameters(text_encoder).items()}
        self.named = named
        cuda = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        self.mean_loss = torch.ones((), device=device)
        self.muon = Muon([(p, _fused_rows(n, p)) for n, p in named.items() if _is_block_matrix(n, p)])
        others = [p for n, p in named.items() if not _is_block_matrix(n, p)]
        self.optimizer = torch.optim.AdamW(
            others, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        self.average = {n: p.detach().clone() for n, p in named.items()}
        self.step = 0
        self.since_start = 0
        self.graphs: dict[int, Any] = {}
        self.use_graphs = cuda

    def resume(self, average: dict[str, Tensor], step: int) -> None:
        """Go on from the averages, with new moments."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                self.average[name].copy_(average[name])
                parameter.copy_(average[name])
        self.step = step

    def compute(self, bucket: Bucket, full: bool) -> None:
        """All that one step does on the device; nothing in it waits for the device or depends on the step."""
        recipe, device = self.recipe, self.device
        length = TEXT_LENGTH if full else CONTEXT
        image = bucket.height * bucket.width
        tokens = length + image * (1 if bucket.references is None else 2)
        batch = recipe.full_batch if full else recipe.short_batch
        batch = max(1, min(batch, batch * (length + 256) // tokens))
        rows = torch.randint(len(bucket.latents), (batch,), device=device)
        which = torch.randint(bucket.ids.shape[1], (batch,), device=device)
        clean = bucket.latents[rows].float()
        noise = torch.randn(clean.shape, device=device)
        # Schedules with a shift of e^0.7 to e^2.2; few even steps begin where the layout is decided.
        uniform, shift, guidance = torch.rand(3, batch, device=device)
        uniform = (torch.arange(batch, device=device) + uniform) / batch
        scale = torch.exp(0.7 + 1.5 * shift)
        sigma = scale * uniform / (scale * uniform + 1 - uniform)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        hidden = F.pad(noisy, (0, 128 - USED))
        places = [image_ids(bucket.height, bucket.width, 0, device)]
        if bucket.references is not None:
            hidden = torch.cat([hidden, F.pad(bucket.references[rows].float(), (0, 128 - USED))], dim=1)
            places.append(image_ids(bucket.height, bucket.width, 10, device))
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            ids, lengths = bucket.ids[rows, which].long(), bucket.lengths[rows, which].long()
            context = self.encode(self.text_encoder, ids, lengths)
            if full:
                context = F.pad(context, (0, 0, TEXT_LENGTH - CONTEXT, 0))
                # Half of the prompts with ComfyUI's pads, which are zeros, and half with those of the encoder.
                few = batch // 2
                pads = encode_padded(self.text_encoder, ids[:few], lengths[:few])
                real = torch.arange(TEXT_LENGTH, device=device) >= TEXT_LENGTH - lengths[:few, None]
                padded = torch.where(real[..., None], context[:few], pads.to(context.dtype))
                context = torch.cat([padded, context[few:]])
            out = self.transformer(
                hidden_states=hidden,
                encoder_hidden_states=context,
                timestep=sigma,
                guidance=1 + 9 * guidance,
                img_ids=torch.cat(places),
                txt_ids=text_ids(length, device),
                return_dict=False,
            )[0]
        weight = bucket.weights[rows].float()[..., None]
        error = (out[:, :image, :USED].float() - (noise - clean)) ** 2
        loss = (weight * error).mean() / 1.3
        for parameter in self.named.values():
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), 1.0)
        self.optimizer.step()
        self.muon.step(self.rate)
        torch._foreach_lerp_(
            list(self.average.values()), [p.detach() for p in self.named.values()], 1 - self.recipe.ema
        )
        self.mean_loss.lerp_(loss.detach(), 0.01)

    def train_step(self, bucket: Bucket, full: bool) -> None:
        """One step; a short one of a bucket that was seen before replays a CUDA graph, since Python is slower."""
        graph = None if full else self.graphs.get(id(bucket))
        if isinstance(graph, torch.cuda.CUDAGraph):
            graph.replay()
        else:
            self.compute(bucket, full)
            if graph == "seen" and self.step > 0:
                self.graphs[id(bucket)] = self.capture(bucket)
            elif graph is None and not full and self.use_graphs:
                self.graphs[id(bucket)] = "seen"
        self.step += 1
        self.since_start += 1

    def capture(self, bucket: Bucket) -> Any:
        graph = torch.cuda.CUDAGraph()
        pool = next((g.pool() for g in self.graphs.values() if isinstance(g, torch.cuda.CUDAGraph)), None)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                self.compute(bucket, False)
        except RuntimeError as error:
            say("no CUDA graph:", str(error)[:200])
            graph = "failed"
        for parameter in self.named.values():
            parameter.grad = None
        return graph

    def run(self, buckets: list[Bucket], seconds: float, finish: bool) -> bool:
        """Train for ``seconds`` or to the end; ``finish`` squeezes all that is left into ``seconds``."""
        recipe = self.recipe
        if self.device.type == "cuda":
            # Graphs cannot be captured on the default stream, and gradients should know one stream only.
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.Stream())
        plain = [b for b in buckets[1:] if b.references is None]
        edits = [b for b in buckets[1:] if b.references is not None]
        total = recipe.short_steps + FULL_COST * recipe.full_steps
        chance = random.Random(recipe.seed + self.step)
        torch.manual_seed(recipe.seed + self.step)
        begin, first, marked, full = time.time(), self.step, (time.time(), self.step), False

        def progress() -> float:
            long = max(0, self.step - recipe.short_steps)
            done = (self.step - long + FULL_COST * long) / total
            return max(done, at_first + (1 - at_first) * (time.time() - begin) / seconds) if finish else done

        at_first = self.step / total
        while (now := progress()) < 1 and time.time() - begin < seconds:
            if now * total >= recipe.short_steps and not full:
                full = True
                say(f"full context from step {self.step} on, loss {self.mean_loss.item():.4f}")
            # Moments that are new after a pause need a warm-up again.
            warm = (self.since_start + 1) / (800 if self.step < 1000 else 200)
            self.rate.fill_(recipe.lr * min(1, warm, (1 - now) / recipe.decay))
            kind = chance.random()
            bucket = buckets[0]
            if edits and self.since_start == 1:
                # Another batch size and another length at once: torch.compile then makes both of them variable.
                bucket = edits[0]
            elif edits and kind < 0.13:
                bucket = edits[0] if chance.random() < 0.7 else chance.choice(edits)
            elif plain and kind < 0.26:
                bucket = chance.choice(plain)
            self.train_step(bucket, full)
            if self.step == first + 50 or self.step % 1000 == 0:
                loss = self.mean_loss.item()
                pace = (self.step - marked[1]) / (time.time() - marked[0])
                marked = time.time(), self.step
                say(f"step {self.step} loss {loss:.4f} {pace:.1f} steps/s progress {now:.2f} rate {self.rate:.1e}")
        return progress() >= 1 or finish

    def write_average(self) -> None:
        """Put the averages into the models; training does not go on from there."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(self.average[name])


# State.


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
    average = {n: t.cpu() for n, t in trainer.average.items()}
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
