"""A VAE in one safetensors file, as ComfyUI loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ParallelismConfig
from ..families import FAMILIES, Family, Model, family_of_text_file, family_of_vae_file
from ..families.others import looks_like_vae
from .config_files import blamed
from .file_reader import FileReader
from .safetensors_reader import Weight, read_header
from .single_file import check_suffix, file_fingerprint, transformer_in


@dataclass(frozen=True)
class VaeFile:
    """What a VAE's file says of itself."""

    path: Path
    family: Family
    vae_config: dict[str, Any]
    components: tuple[str, ...] = ("vae",)

    def check(self, layout: ParallelismConfig) -> None:
        """Any layout will do: each rank that works on a picture has the whole VAE."""

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
        kind = self.family.needs_vae()
        vae = kind.build(self.vae_config).to_empty(device="cpu").float()
        with FileReader() as reader:
            tensors = {key: reader.whole(stored) for key, stored in read_header(self.path).items()}
        try:
            vae.load_state_dict(kind.tensors(tensors))
        except RuntimeError as error:  # of torch, with all names
            raise ValueError(" ".join(str(error).split())[:300]) from None
        return vae.eval()


def open_known_vae_file(path: Path) -> VaeFile:
    """As `open_vae_file`; ValueError says what the file is where it is no VAE that a family knows."""
    found = open_vae_file(path)
    if found is not None:
        return found
    keys = read_header(Path(path))
    # A VAE may serve several families.
    titles = {family.vae.title: family.vae.file_title for family in FAMILIES if family.vae is not None}
    supported = "; ".join(f"{title}: {files}" for title, files in titles.items())
    if transformer := transformer_in(keys)[0]:
        title, loader = f"the transformer of {transformer.title}", "Load Diffusion Model (Parallel)"
        raise ValueError(f"{path} looks like {title}, which {loader} loads; supported are {supported}")
    if encoder := family_of_text_file(keys):
        title, loader = f"the text encoder of {encoder.title}", "Load CLIP (Parallel)"
        raise ValueError(f"{path} looks like {title}, which {loader} loads; supported are {supported}")
    look = looks_like_vae(keys)
    if look is not None:
        raise ValueError(look.refusal(path, f"supported are {supported}", ""))
    raise ValueError(f"{path} has {len(keys)} tensors, which is no VAE that is known here; supported are {supported}")


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
