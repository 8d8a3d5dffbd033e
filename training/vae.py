"""Trains the VAE on windows of rendered scenes, and sets the latents' statistics."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import encode_pictures
from .models import CHANNELS, PREVIEW, USED, build_vae, empty_unused_channels, with_all_channels
from .recipe import Recipe, say
from .render import render


def train_vae(recipe: Recipe, scenes: Tensor, device: Any, seconds: float) -> Any:
    """Reconstruct windows of 128 x 128 around shapes; the latents' statistics become the batch norm's."""
    torch.manual_seed(recipe.seed)
    vae = build_vae().to(device).to(memory_format=torch.channels_last)
    empty_unused_channels(vae)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.vae_lr, betas=(0.9, 0.98), weight_decay=1e-4)
    colours = torch.tensor(list(PREVIEW.values()), device=device)
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
            mean, deviation = posterior.mean[:, list(CHANNELS)].float(), posterior.std[:, list(CHANNELS)].float()
            latent = mean + deviation * torch.randn_like(mean)
            out = vae.decode(with_all_channels(latent, 1, CHANNELS, 32)).sample.float()
        divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).mean()
        error = F.mse_loss(out, picture)
        likeness = F.mse_loss(_preview(mean, colours), F.avg_pool2d(picture, 8))
        loss = F.l1_loss(out, picture) + error + 2e-4 * divergence + 0.05 * likeness
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        empty_unused_channels(vae)
        if step % 500 == 0:
            say(f"vae {step} psnr {(10 * (4 / error).log10()).item():.1f} kl {divergence.item():.2f} "
                f"preview {(10 * (4 / likeness).log10()).item():.1f}")  # fmt: skip
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
            f"latent std {flat.std(0)[list(USED)].min().item():.2f}..{flat.std(0).max().item():.2f}")  # fmt: skip
    return vae


def _preview(latent: Tensor, colours: Tensor) -> Tensor:
    """What ComfyUI shows while it samples: normalized ``latent [B, C, h, w]`` as RGB ``[B, 3, h, w]``."""
    variance, mean = torch.var_mean(latent, dim=(0, 2, 3), keepdim=True)
    return torch.einsum("bchw,cr->brhw", (latent - mean) * (variance + 1e-4).rsqrt(), colours)
