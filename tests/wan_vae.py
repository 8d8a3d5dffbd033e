"""Wan's VAEs, small and random, and what one takes: operations and the bytes that are held at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from parallel_backend.families.vaes import wan
from parallel_backend.families.vaes.wan import WanVAE
from parallel_backend.parallel.tensor import Model

RESIDUAL = {"in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}
WAN_22 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, **RESIDUAL, **wan._LATENTS_22}
CONFIGS: dict[str, dict[str, Any]] = {
    "2.1": {"base_dim": 8},
    "2.2": {**WAN_22, "base_dim": 8, "decoder_base_dim": 12},
}
"""As the true ones, but for their widths."""


def tiny_vae(kind: str) -> Model:
    """One whose pictures are within -1..1, and whose latents have the spread that its statistics say."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**CONFIGS[kind]).eval()
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        latent = torch.randn(1, vae.config.z_dim, 2, 6, 6)
        vae.decoder.conv_out.weight.mul_(0.4 / vae.decode(latent).sample.std())
        picture = 0.5 * torch.randn(1, 3, 5, 96, 96).clamp(-1, 1)
        spread = torch.tensor(vae.config.latents_std).mean() / vae.encode(picture).latent_dist.mean.std()
        vae.quant_conv.weight[: vae.config.z_dim].mul_(spread)
    return vae


def comfy_tensors(vae: Model) -> dict[str, Tensor]:
    """Its weights under ComfyUI's names, by the rules of Wan's own code: layers of a list by their places in it."""
    is_22 = bool(vae.config.is_residual)
    named = {}
    for name, tensor in vae.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("quant_conv", "post_quant_conv"):
            named[".".join(["conv1" if parts[0] == "quant_conv" else "conv2", *parts[1:]])] = tensor
            continue
        coder, part, *rest = parts
        if part in ("conv_in", "norm_out", "conv_out"):
            key = [{"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}[part], *rest]
        elif part == "mid_block":
            place = "1" if rest[0] == "attentions" else {"0": "0", "1": "2"}[rest[1]]
            key = ["middle", place, *rest[2:]]
        elif part == "down_blocks" and not is_22:
            key = ["downsamples", *rest]
        else:
            many = 2 if part == "down_blocks" else 3
            what = "downsamples" if part == "down_blocks" else "upsamples"
            level, kind, *layer = rest
            index = many
            if kind == "resnets":
                index, layer = int(layer[0]), layer[1:]
            elif not is_22:
                layer = layer[1:]
            key = [what, level, what, str(index)] if is_22 else [what, str((many + 1) * int(level) + index)]
            key += layer
        layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
        inner = {**layers, "conv_shortcut": "shortcut"} if part in ("mid_block", "down_blocks", "up_blocks") else {}
        named[".".join([coder, *(inner.get(piece, piece) for piece in key)])] = tensor
    return {key: tensor.contiguous() for key, tensor in named.items()}


def write_wan_vae(path: Path, kind: str = "2.1") -> Path:
    """Write a tiny one as ComfyUI has it."""
    save_file(comfy_tensors(tiny_vae(kind)), path)
    return path


def whole_decode(vae: Model, latent: Tensor) -> Tensor:
    """diffusers' own picture of a latent as the transformer sees it."""
    mean, std = _statistics(vae)
    return vae.decode(latent * std + mean, return_dict=False)[0]


def whole_encode(vae: Model, image: Tensor) -> Tensor:
    """The way back."""
    mean, std = _statistics(vae)
    return (vae.encode(image, return_dict=False)[0].mode() - mean) / std


def _statistics(vae: Model) -> list[Tensor]:
    return [torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)]


class PeakBytes(TorchDispatchMode):
    """Bytes that tensors made within hold together at most, on any device, meta too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return out

    def _freed(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.now -= size


def cost(
    config: Mapping[str, Any], axis: Any, decodes: bool, size: tuple[int, int], pieces: int = 3
) -> tuple[int, int]:
    """Operations and peak bytes (with the weights) of one rank for the first pieces of a clip; nothing is computed.

    Args:
        config: of the VAE.
        axis: over whose ranks; none of them is asked for anything.
        decodes: or encodes.
        size: height and width of the pictures.
        pieces: the first of which has a frame less, so that all layers have kept what they keep after three.
    """
    kind = WanVAE()
    vae = kind.build(config)
    shape = kind.latent_shape(config)
    height, width = size
    if decodes:
        height, width = height // shape.downscale, width // shape.downscale
    channels = shape.channels if decodes else 3
    lengths = kind.latent_pieces(pieces) if decodes else kind.image_pieces(shape.pictures(pieces))
    run: Any = kind.start(vae, config, decodes, axis, (1, channels, 1, height, width))
    run.bands._all_gather = lambda x: x
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    with PeakBytes() as peak, FlopCounterMode(display=False) as flops:
        for length in lengths:
            whole = torch.empty(1, channels, length, height, width, device="meta")
            run.piece(whole)
            del whole
    return flops.get_total_flops(), peak.peak + weights
