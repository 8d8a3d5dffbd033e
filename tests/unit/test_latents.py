"""Latents that a family cannot take are refused before anything is sent to workers; errors have short names."""

from __future__ import annotations

import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel_backend.families import FAMILIES, Conditioning, Family
from parallel_backend.runtime import errors
from parallel_backend.runtime.client.remote_model import RemoteModel


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


def config(family: Family) -> dict[str, Any]:
    return dict(family.reference_model.transformer_config)


def shape(family: Family, **changes: int) -> list[int]:
    channels = family.transformer.latent_look(config(family)).channels
    sizes = {"batch": 1, "channels": channels, "frames": 1, "height": 4, "width": 4} | changes
    return [size for name, size in sizes.items() if name != "frames" or family.transformer.latent_dims == 5]


def refusal(family: Family, latent: list[int], reference: list[int] | None = None) -> str:
    """What `RemoteModel.predict` says; its group has nothing that could send."""
    model = RemoteModel(None, None, SimpleNamespace(family=family, transformer_config=config(family)), "m1")  # type: ignore[arg-type]
    references = () if reference is None else (torch.zeros(reference),)
    with pytest.raises(ValueError, match="latent has") as caught:
        model.predict(torch.zeros(latent), torch.ones(1), Conditioning(torch.zeros(1, 3, 8), references))
    return str(caught.value)


def test_what_is_right_is_taken(family):
    for sizes in ({}, {"batch": 3}, {"height": 1, "width": 1}):
        family.transformer.check_latent(shape(family, **sizes), config(family))


def test_other_dims(family):
    good = shape(family)
    assert f"the latent has the shape {[1, 64, 9]} (audio), {family.title} takes [batch, channels," in refusal(
        family, [1, 64, 9]
    )
    other = [*good[:2], *good[3:]] if family.transformer.latent_dims == 5 else [*good[:2], 2, *good[2:]]
    assert f"the shape {other}" in refusal(family, other)


def test_other_channels(family):
    text = f"the latent has 4 channels, {family.title} takes {family.transformer.latent_channels}"
    assert refusal(family, shape(family, channels=4)) == text
    assert refusal(family, shape(family), shape(family, channels=4)) == text.replace("latent", "reference latent", 1)


@pytest.mark.parametrize("axis", ["batch", "height", "width"])
def test_nothing_in_it(axis, family):
    assert "there is nothing in it" in refusal(family, shape(family, **{axis: 0}))


def test_frames(family):
    if family.transformer.frame_downscale:
        family.transformer.check_latent(shape(family, frames=3), config(family))
    elif family.transformer.latent_dims == 5:
        assert "the latent has 3 frames (or layers)" in refusal(family, shape(family, frames=3))
    else:
        assert "(a video)" in refusal(family, [1, family.transformer.latent_channels, 3, 4, 4])


@pytest.mark.parametrize("name", ["WorkersFailedError", "RequestFailedError", "OutOfMemoryError"])
def test_errors_have_no_path_before_their_text(name):
    (line,) = traceback.format_exception_only(getattr(errors, name)("rank 1 ended"))
    assert line == f"{name}: rank 1 ended\n"
