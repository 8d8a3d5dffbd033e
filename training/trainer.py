"""Trains transformer and text encoder on encoded scenes: flow matching, Muon and AdamW, averages, CUDA graphs."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import CONTEXT, Bucket
from .models import SIZE, TEXT_LENGTH, USED, encode_padded, image_ids, on_device, text_ids, with_all_channels
from .muon import Muon
from .reader import used_text_parameters
from .recipe import FULL_COST, Recipe, say


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
    """Transformer and text encoder with optimizer and moving averages; trains ``named``, or all of both."""

    def __init__(
        self, recipe: Recipe, transformer: Any, text_encoder: Any, encode: Any, device: Any,
        named: dict[str, nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.device, self.encode = recipe, device, encode
        self.transformer, self.text_encoder = transformer, text_encoder
        if named is None:
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
        hidden = with_all_channels(noisy, 2, USED, 128)
        places = [image_ids(bucket.height, bucket.width, 0, device)]
        if bucket.references is not None:
            hidden = torch.cat([hidden, with_all_channels(bucket.references[rows].float(), 2, USED, 128)], dim=1)
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
        error = (out[:, :image].index_select(2, on_device(USED, device)).float() - (noise - clean)) ** 2
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
        graph: Any = torch.cuda.CUDAGraph()
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
