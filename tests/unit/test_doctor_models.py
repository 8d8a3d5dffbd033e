"""What the doctor says of model folders: entries that no loader can use, each with a remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parallel_backend.cli.doctor_models import SHOWN, check_models


@pytest.fixture
def models(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    for kind in ("diffusion_models", "text_encoders", "diffusers", "vae"):
        (models / kind).mkdir(parents=True)
    (models / "diffusion_models" / "good.safetensors").touch()
    (models / "text_encoders" / "good.sft").touch()
    (models / "vae" / "old.pt").touch()  # which ComfyUI reads
    (models / "diffusers" / "ORG" / "NAME").mkdir(parents=True)
    (models / "diffusers" / "ORG" / "NAME" / "model_index.json").touch()
    return models


def said(models: Path) -> list[tuple[str, str, str]]:
    return check_models(str(models.parent))


def test_nothing_is_wrong(models):
    assert said(models) == [("ok", f"2 model files and 1 pipeline folders in {models}", "")]


def test_links_that_lead_nowhere(models):
    for number in range(SHOWN + 2):
        (models / "vae" / f"gone{number}.safetensors").symlink_to("nowhere")
    (_, (level, text, remedy)) = said(models)
    assert level == "warn"
    assert text.startswith(f"a link that leads nowhere: {models}/vae/gone0.safetensors, ")
    assert text.endswith(" and 2 more")
    assert "download it again" in remedy


def test_other_kinds_and_names(models):
    (models / "diffusion_models" / "flux.gguf").touch()
    with open(os.fsencode(models / "text_encoders") + b"/\xe9.safetensors", "w"):
        pass
    texts = {text.partition(":")[0]: remedy for _, text, remedy in said(models)[1:]}
    assert texts == {
        "a GGUF file, which is not read": "take the model as .safetensors",
        "a name that is not UTF-8, which libraries cannot open": "rename it",
    }


def test_what_cannot_be_read(models):
    closed = models / "diffusion_models" / "closed"
    closed.mkdir()
    closed.chmod(0)
    for folder in (models.parent, *models.parent.parents):
        if folder.stat().st_uid == os.geteuid() and os.geteuid() == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        found = said(models)
    finally:
        os.seteuid(was)
        closed.chmod(0o700)
    assert (
        "warn",
        f"no loader sees what is in it, as it cannot be read: {closed}",
        "let ComfyUI's user read it",
    ) in found


def test_links_in_a_circle_end(models):
    (models / "diffusers" / "again").symlink_to(models / "diffusers")
    assert said(models)[0][0] == "ok"
