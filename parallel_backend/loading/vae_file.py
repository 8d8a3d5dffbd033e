"""A VAE in one safetensors file, as ComfyUI loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..config import ParallelismConfig
from ..families import Family, Model, family_of_vae_file
from .config_files import blamed
from .safetensors_reader import Weight, read_header
from .single_file import check_suffix, file_fingerprint


@dataclass(frozen=True)
class VaeFile:
    """What a VAE's file says of itself."""

    path: Path
    family: Family
    vae_config: dict[str, Any]
    components: tuple[str, ...] = ("vae",)

    def check(self, layout: ParallelismConfig) -> None:
        """Any layout will do: the VAE is whole on rank 0."""

    def check_weights(self) -> None:
        """They are looked at when they are loaded."""

    def weights(self, component: str) -> dict[str, Weight]:
        """None: the VAE is loaded by `load`."""
        return {}

    def fingerprint(self) -> str:
        """See `file_fingerprint`."""
        return file_fingerprint(self.path)

    def load(self) -> Model:
        """The VAE, whole, on the CPU, in fp32; ValueError for tensors that are missing, or too many."""
        vae = self.family.needs_vae().build(self.vae_config).to_empty(device="cpu").float()
        try:
            vae.load_state_dict(self.family.needs_vae().tensors(load_file(self.path)))
        except RuntimeError as error:  # of torch, with all names
            raise ValueError(" ".join(str(error).split())[:300]) from None
        return vae.eval()


def open_vae_file(path: Path) -> VaeFile | None:
    """Look at a file's header; None if no family knows it as its VAE."""
    path = Path(path)
    check_suffix(path)
    keys = read_header(path)
    family = family_of_vae_file(keys)
    if family is None:
        return None
    with blamed(path):
        config = family.needs_vae().file_config({key: tensor.shape for key, tensor in keys.items()})
        return VaeFile(path, family, config)
