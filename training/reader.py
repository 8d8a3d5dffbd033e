"""Gives the text encoder a start: it learns to say what a caption says, before there are any pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Texts
from .models import SIZE
from .recipe import Recipe, say
from .render import SLOTS
from .scenes import COLOUR_NAMES, SHAPES


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
