"""The model families that are known: one file each, found here by the names that pipelines and models go by."""

from __future__ import annotations

from collections.abc import Collection

from .base import Conditioning, Family, Model, ModelAdapter, ReferenceModel, VisionImage
from .flux2 import Flux2
from .qwen_image import QwenImage

FAMILIES: tuple[Family, ...] = (Flux2(), QwenImage())


def family_of_name(name: str) -> Family:
    """The family of a short name.

    Raises:
        ValueError: there is none; names those that there are.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"there is no model family {name!r}; there are: {', '.join(family.name for family in FAMILIES)}")


def family_of_pipeline(class_name: str) -> Family:
    """The family of a diffusers pipeline class.

    Raises:
        ValueError: no family knows it; names those that are supported.
    """
    for family in FAMILIES:
        if class_name in family.pipeline_classes:
            return family
    raise ValueError(f"the pipeline class {class_name} is not supported; supported are: {_supported()}")


def family_of_transformer(class_name: str) -> Family:
    """The family of a diffusers transformer class.

    Raises:
        ValueError: no family knows it; names those that are supported.
    """
    for family in FAMILIES:
        if class_name == family.transformer_class:
            return family
    raise ValueError(f"the transformer class {class_name} is not supported; supported are: {_supported()}")


def family_of_single_file(keys: Collection[str]) -> Family | None:
    """The family of the transformer whose tensors have these keys in a single file; None if no family knows them."""
    return next((family for family in FAMILIES if family.is_single_file(keys)), None)


def family_of_text_file(keys: Collection[str]) -> Family | None:
    """The family whose text encoder has these keys in a single file; None if no family knows them."""
    return next((family for family in FAMILIES if family.is_text_file(keys)), None)


def supported_models() -> str:
    """The end of a message that refuses a model: those that are supported."""
    models = "; ".join(f"{family.title} ({', '.join(family.models)})" for family in FAMILIES)
    return f"supported are: {models} (python -m parallel_backend families says more)"


def _supported() -> str:
    return "; ".join(
        f"{family.title} ({', '.join((*family.pipeline_classes, family.transformer_class))})" for family in FAMILIES
    )


__all__ = [
    "FAMILIES",
    "Conditioning",
    "Family",
    "Model",
    "ModelAdapter",
    "ReferenceModel",
    "VisionImage",
    "family_of_name",
    "family_of_pipeline",
    "family_of_single_file",
    "family_of_text_file",
    "family_of_transformer",
    "supported_models",
]
