"""The model families that are known: a folder each, found here by the names that pipelines and models go by."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..parallel.tensor import Model
from .conditioning import Conditioning, VisionImage
from .family import Family, ReferenceModel
from .flux2.family import FLUX2
from .qwen_image.family import QWEN_IMAGE
from .text_encoder import TextEncoder
from .transformer import Transformer
from .vae import VAE
from .wan.family import WAN
from .z_image.family import Z_IMAGE

COMPONENTS = ("transformer", "text_encoder", "vae")
"""What a family may bring."""
FAMILIES: tuple[Family, ...] = (FLUX2, QWEN_IMAGE, Z_IMAGE, WAN)


def family_of_name(name: str) -> Family:
    """The family of its name, of one of its models', or of a part of those: ``qwen``, ``FLUX.2-dev``, ``edit-2511``.

    Raises:
        ValueError: there is none, or several; names those that there are.
    """
    asked = _plain(name)
    names = {family: [_plain(one) for one in (family.name, family.title, *family.models)] for family in FAMILIES}
    exact = [family for family, known in names.items() if asked in known]
    found = exact or [family for family, known in names.items() if asked and any(asked in one for one in known)]
    if len(found) == 1:
        return found[0]
    problem = f"{name!r} may be {' or '.join(f.title for f in found)}" if found else f"there is no model {name!r}"
    raise ValueError(f"{problem}; there are: {', '.join(f'{f.name} ({_models(f)})' for f in FAMILIES)}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _models(family: Family) -> str:
    return ", ".join(family.models)


def family_of_pipeline(class_name: str) -> Family:
    """The family of a diffusers pipeline class.

    Raises:
        ValueError: no family reads its folders; says what to take instead where one has its transformer, and which
            classes are supported.
    """
    for family in FAMILIES:
        if class_name in family.pipeline_classes:
            return family
        if class_name in family.pipelines_of_others:
            if family.text_encoder is not None and not family.drawings:
                raise ValueError(
                    f"folders of {class_name} are not read; load this model's files with Load Diffusion Model "
                    "(Parallel), Load CLIP (Parallel) and Load VAE (Parallel)"
                )
            raise ValueError(
                f"folders of {class_name} are not read: of this model the workers hold the transformer alone; load its "
                "file with Load Diffusion Model (Parallel), and text encoder and VAE with ComfyUI's own nodes"
            )
    raise ValueError(f"the pipeline class {class_name} is not supported; supported are: {_supported()}")


def family_of_transformer(class_name: str) -> Family:
    """The family of a diffusers transformer class.

    Raises:
        ValueError: no family knows it; names those that are supported.
    """
    for family in FAMILIES:
        if class_name == family.transformer.class_name:
            return family
    raise ValueError(f"the transformer class {class_name} is not supported; supported are: {_supported()}")


def family_of_single_file(keys: Collection[str]) -> Family | None:
    """The family of the transformer whose tensors have these keys in a single file; None if no family knows them."""
    return next((family for family in FAMILIES if family.transformer.is_file(keys)), None)


def family_of_text_file(keys: Collection[str]) -> Family | None:
    """The first family whose text encoder has these keys in a single file; None if no family knows them."""
    return next((f for f in FAMILIES if f.text_encoder is not None and f.text_encoder.is_file(keys)), None)


def family_of_vae_file(keys: Collection[str]) -> Family | None:
    """The first family whose VAE has these keys in a single file; None if no family knows them."""
    return next((family for family in FAMILIES if family.vae is not None and family.vae.is_file(keys)), None)


def supported_models() -> str:
    """The end of a message that refuses a model: those that are supported."""
    models = "; ".join(f"{family.title} ({_models(family)})" for family in FAMILIES)
    return f"supported are: {models} (python -m parallel_backend families says more)"


def files_instead(component: str) -> str:
    """Names of files to take in the place of one that is not read: of the ``transformer`` or the ``text_encoder``."""
    index = COMPONENTS.index(component)
    files = (family.reference_model.fp8_files for family in FAMILIES)
    return " or ".join(names[index] for names in files if len(names) > index)


def _supported() -> str:
    return "; ".join(
        f"{family.title} ({', '.join((*family.pipeline_classes, family.transformer.class_name))})"
        for family in FAMILIES
    )


__all__ = [
    "COMPONENTS",
    "FAMILIES",
    "VAE",
    "Conditioning",
    "Family",
    "Model",
    "ReferenceModel",
    "TextEncoder",
    "Transformer",
    "VisionImage",
    "family_of_name",
    "family_of_pipeline",
    "family_of_single_file",
    "family_of_text_file",
    "family_of_transformer",
    "family_of_vae_file",
    "files_instead",
    "supported_models",
]
