"""What is said to be supported: read off the families, and the same in docs/models.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from parallel_backend.cli import main
from parallel_backend.cli.doctor import check_formats
from parallel_backend.cli.families import render_markdown
from parallel_backend.families import FAMILIES, family_of_name
from parallel_backend.loading.quantized import FP8_FORMATS
from parallel_backend.parallel.tensor import Shard
from parallel_backend.planning.fits import fits_table
from parallel_backend.planning.support import copies, support

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by `python -m parallel_backend families --markdown` -->", "<!-- families end -->"


@pytest.fixture(scope="module")
def found():
    return support()


def test_the_page_has_the_table(found):
    _, begin, rest = PAGE.read_text().partition(BEGIN)
    assert END in rest, f"docs/models.md lacks the line {END if begin else BEGIN}"
    table, _, _ = rest.partition(END)
    assert table.strip() == render_markdown(**found), (
        "docs/models.md is not up to date: put what `python -m parallel_backend families --markdown` prints between "
        f"the lines {BEGIN} and {END}"
    )


def test_flux2(found):
    flux2 = found["families"]["flux2"]
    assert flux2.blocks == {"transformer_blocks": 8, "single_transformer_blocks": 48}
    assert flux2.ulysses == flux2.tp == (1, 2, 3, 4, 6, 8)  # 48 heads
    assert flux2.ring == tuple(range(1, 9))
    assert flux2.transformer_gib[1] == pytest.approx(60.0, abs=0.1)
    assert flux2.text_ranks == 8
    assert flux2.copies["text_encoder"] == {
        "layers.*.input_layernorm": 8,
        "layers.*.post_attention_layernorm": 8,
    }


def test_qwen_image(found):
    qwen = found["families"]["qwen_image"]
    assert qwen.blocks == {"transformer_blocks": 60}
    assert qwen.ulysses == qwen.tp == (1, 2, 3, 4, 6, 8)  # 24 heads
    assert qwen.transformer_gib[1] == pytest.approx(20.43e9 * 2 / 2**30, abs=0.1)
    # 4 kv heads: on 8 ranks, two hold the same one.
    assert qwen.text_ranks == 8
    assert qwen.copies["text_encoder"]["layers.*.self_attn.k_proj"] == 2
    assert "layers.*.self_attn.q_proj" not in qwen.copies["text_encoder"]
    assert qwen.vision_tower


def test_z_image(found):
    z_image = found["families"]["z_image"]
    assert z_image.blocks == {"layers": 30}
    assert z_image.ulysses == z_image.tp == (1, 2, 3, 5, 6)  # 30 heads
    assert z_image.transformer_gib.keys() == {1, 2}
    assert z_image.transformer_gib[1] == pytest.approx(6.15e9 * 2 / 2**30, abs=0.1)
    assert (z_image.pipelines, z_image.text_encoder, z_image.vae) == ((), "", "")


def test_a_family_without_fp8_files():
    rows = [row for row in fits_table().splitlines() if "Z-Image" in row]
    assert [row.split(" | ")[0] for row in rows] == ["| Z-Image-Turbo, bf16"]
    assert [finding.text for finding in check_formats(family_of_name("z_image"), []) if " as " in finding.text] == []


def test_dtypes_are_those_that_files_of_torch_have(found):
    files = found["files"]
    assert set(files["fp8_dtypes"]) == set(FP8_FORMATS)
    assert "bfloat16" in files["dtypes"]
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in files["dtypes"])


def test_copies():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8), "n": nn.LayerNorm(8)})])})
    assert copies(model, {"blocks.*.q": Shard("column")}, 4) == {"blocks.*.n": 4}
    assert copies(model, {"blocks.*.q": Shard("column", units=2)}, 4) == {"blocks.*.q": 2, "blocks.*.n": 4}
    assert copies(model, {}, 2) == {"blocks.*.q": 2, "blocks.*.n": 2}
    assert copies(model, {}, 1) == {}


def test_every_family_says_which_models_it_covers():
    for family in FAMILIES:
        assert family.reference_model.name in family.models
        assert set(family.transformer_alone) < set(family.models)


def test_the_command_prints_json_and_text(capsys, monkeypatch, found):
    monkeypatch.setattr("parallel_backend.planning.support.support", lambda: dict(found))
    assert main(["families", "--json"]) == 0
    families = json.loads(capsys.readouterr().out)["families"]
    assert families["qwen_image"]["models"] == list(found["families"]["qwen_image"].models)
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    assert "Qwen-Image (--model qwen_image)" in out
    assert "`" not in out
