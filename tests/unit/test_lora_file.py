"""LoRA files without ComfyUI: every spelling, on every family, and one clear line for what does not fit."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import enable_cache, set_lora
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_transformer
from parallel_backend.loading.lora_file import read_loras
from tests import tiny_qwen
from tests.distributed import cases
from tests.lora_files import RANK, STYLES, added, distance, factors_of, write_lora
from tests.z_image_file import z_image_model

MODELS = {"flux2": cases.tiny_transformer, "qwen_image": tiny_qwen.tiny_transformer, "z_image": z_image_model}
PARITY = 1e-6
"""fp32 sums in another order."""


def kind_of(model: Any):
    return family_of_transformer(type(model).__name__).transformer


@pytest.fixture(scope="module")
def models():
    """Made once; tests leave them as they were."""
    return functools.cache(lambda family: (torch.manual_seed(0), MODELS[family]())[1])


USUAL = ("diffusers", "bare", "lycoris", "comfyui")
"""Spellings of files for models of all families; the others are read by the same few lines."""


@pytest.fixture(scope="module")
def flux2(models):
    return models("flux2")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lora.safetensors"


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_close(model: Any, wanted: dict[str, Tensor]) -> None:
    for name, weight in model.named_parameters():
        assert distance(weight, wanted[name]) <= PARITY, name


def assert_clean(model: Any, clean: dict[str, Tensor]) -> None:
    assert all(torch.equal(weight, clean[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "style"),
    [
        pytest.param(f, s, marks=[] if f == "flux2" or s in USUAL else [pytest.mark.thorough])
        for f in MODELS
        for s in STYLES
    ],
)
def test_every_spelling(models, family, style, path):
    """All linears of the model, with and without an alpha; off again, the weights are what they were."""
    model = models(family)
    kind, clean = kind_of(model), state_of(model)
    factors = factors_of(model, kind)
    write_lora(path, style, kind, factors)
    assert set_lora(model, [(path, 0.7)]) is model
    assert_close(model, added(clean, (factors, 0.7)))
    write_lora(path, style, kind, factors, alpha=2 * RANK)
    set_lora(model, [(str(path), -0.5)])
    assert_close(model, added(clean, (factors, -1.0)))
    set_lora(model, [])
    assert_clean(model, clean)


def test_several_in_order_in_bf16_rounded_once(flux2, tmp_path):
    model = MODELS["flux2"]().bfloat16()
    kind, clean = kind_of(model), state_of(model)
    one, two = (factors_of(model, kind, seed) for seed in (1, 2))
    files = [write_lora(tmp_path / f"{n}.safetensors", "diffusers", kind, f) for n, f in enumerate((one, two))]
    set_lora(model, [(files[0], 1.0), (files[1], 0.0), (files[1], 2.0)])
    exact = added({name: weight.float() for name, weight in clean.items()}, (one, 1.0), (two, 2.0))
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        rounded = exact[name].bfloat16()
        assert (weight != rounded).float().mean() < 1e-3, name  # sums in another order hardly ever round otherwise
    read = read_loras(kind, dict(model.config), [(files[0], 1.0), (files[1], 0.0), (files[1], 2.0)])
    assert read.title == "0 at 1, 1 at 2"
    set_lora(model, [(files[1], 2.0)])
    set_lora(model, [(files[1], 0.0)])
    assert_clean(model, clean)


def test_other_kinds(flux2, path):
    """DoRA of rows, LoHa, LoKr and plain differences, of weights and biases, in the words of the papers."""
    clean, generator = state_of(flux2), torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    q, k = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
    out, mlp = "single_transformer_blocks.1.attn.to_out", "transformer_blocks.1.ff.linear_in"
    norm = "transformer_blocks.0.attn.norm_q"
    rows, columns = clean[f"{q}.weight"].shape
    loha = [random(clean[f"{k}.weight"].shape[0], 2), random(2, columns), random(rows, 4), random(4, columns)]
    height, width = clean[f"{out}.weight"].shape
    w1, w2a, w2b = random(4, 8), random(height // 4, RANK), random(RANK, width // 8)
    up, down, lengths = random(rows, RANK), random(RANK, columns), 1 + random(rows, 1)
    difference, of_norm = random(*clean[f"{mlp}.weight"].shape), random(*clean[f"{norm}.weight"].shape)
    tensors = {
        f"transformer.{q}.lora_A.weight": down, f"transformer.{q}.lora_B.weight": up,
        f"transformer.{q}.dora_scale": lengths, f"transformer.{q}.alpha": torch.tensor(6.0),
        **{f"transformer.{k}.hada_{name}": t for name, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), loha, strict=True)},
        f"transformer.{k}.alpha": torch.tensor(8.0),
        f"transformer.{out}.lokr_w1": w1, f"transformer.{out}.lokr_w2_a": w2a, f"transformer.{out}.lokr_w2_b": w2b,
        f"transformer.{out}.alpha": torch.tensor(1.5),
        "diffusion_model.double_blocks.1.img_mlp.0.diff": difference,
        f"transformer.{norm}.diff": of_norm,
    }  # fmt: skip
    save_file(tensors, path)
    wanted = dict(clean)
    w = clean[f"{q}.weight"]
    changed = (w + 6.0 / RANK * up @ down) * lengths / w.norm(dim=1, keepdim=True)
    wanted[f"{q}.weight"] = w + 0.5 * (changed - w)
    wanted[f"{k}.weight"] = clean[f"{k}.weight"] + 0.5 * 8.0 / 2 * (loha[0] @ loha[1]) * (loha[2] @ loha[3])
    wanted[f"{out}.weight"] = clean[f"{out}.weight"] + 0.5 * 1.5 / RANK * torch.kron(w1, w2a @ w2b)
    wanted[f"{mlp}.weight"] = clean[f"{mlp}.weight"] + 0.5 * difference
    wanted[f"{norm}.weight"] = clean[f"{norm}.weight"] + 0.5 * of_norm
    set_lora(flux2, [(path, 0.5)])
    assert_close(flux2, wanted)
    set_lora(flux2, [])
    assert_clean(flux2, clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_of_fewer_bits(flux2, path, dtype):
    name, clean = "transformer_blocks.0.attn.to_v", state_of(flux2)
    up, down = torch.randn(128, RANK).to(dtype), torch.randn(RANK, 128).to(dtype)
    save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, path)
    set_lora(flux2, [(path, 1.0)])
    assert_close(flux2, added(clean, ({name: (up.float(), down.float())}, 1.0)))
    set_lora(flux2, [])


CONFIGURATION = {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"attn.to_k": 9.0}}


@pytest.mark.parametrize("where", ["in the file", "beside it"])
@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_the_configuration_of_training(flux2, tmp_path, where, rslora):
    q, k = (f"transformer_blocks.1.attn.to_{part}" for part in "qk")
    names = {q: 6.0, k: 9.0}
    factors = {name: pair for name, pair in factors_of(flux2, kind_of(flux2)).items() if name in names}
    config, clean = CONFIGURATION | {"use_rslora": rslora}, state_of(flux2)
    path = tmp_path / "adapter_model.safetensors"
    write_lora(path, "peft" if where == "beside it" else "diffusers", kind_of(flux2), factors)
    if where == "beside it":
        path.with_name("adapter_config.json").write_text(json.dumps(config))
    else:
        said = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
        save_file(load_file(path), path, metadata=said)
    set_lora(flux2, [(path, 1.0)])
    root = math.sqrt(RANK) if rslora else RANK
    assert_close(flux2, added(clean, *(({name: factors[name]}, alpha / root) for name, alpha in names.items())))
    set_lora(flux2, [])


class TestWhatDoesNotFit:
    def test_another_model(self, flux2, path):
        clean, kind = state_of(flux2), kind_of(flux2)
        factors = dict(list(factors_of(flux2, kind).items())[:4])
        write_lora(path, "diffusers", kind, factors)
        tensors = load_file(path)
        gone = "transformer.transformer_blocks.7.attn.to_q.lora_A.weight"
        save_file({**tensors, gone: torch.zeros(RANK, 128)}, path)
        text = refused(flux2, path)
        assert re.search(
            rf"^1 of 9 tensors in {re.escape(str(path))} are of no weight that FLUX.2 has, the first is {gone}", text
        )
        assert text.endswith("it is a LoRA for another model, or in a form that is not read")
        save_file({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}, path)
        assert "1 of 1 tensors" in refused(flux2, path)
        save_file({}, path)
        assert "0 of 0 tensors" in refused(flux2, path)
        assert_clean(flux2, clean)

    def test_other_sizes(self, flux2, path):
        kind = kind_of(flux2)
        write_lora(path, "comfyui", kind, factors_of(flux2, kind))
        larger = MODELS["flux2"](num_attention_heads=4)
        text = refused(larger, path)
        assert re.search(r"^(\d+) of \1 weights that .* changes have another size in this model: ", text)
        assert re.search(r"has the shape \[\d+, \d+\], the model \[\d+, \d+\]", text)

    def test_half_of_a_pair(self, flux2, path):
        save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(RANK, 128)}, path)
        assert "transformer_blocks.0.attn.to_q" in refused(flux2, path)
        assert "has down, but no up" in refused(flux2, path)

    def test_numbers_that_are_none(self, flux2, path):
        name = "transformer_blocks.0.attn.to_q"
        tensors = {f"{name}.lora_B.weight": torch.zeros(128, RANK), f"{name}.lora_A.weight": torch.zeros(RANK, 128)}
        tensors[f"{name}.lora_B.weight"][5, 1] = math.nan
        save_file(tensors, path)
        assert f"{name}.lora_B.weight in {path} holds values that are not finite" in refused(flux2, path)

    @pytest.mark.parametrize(
        ("end", "what"),
        [("a1.weight", "GLoRA"), ("oft_blocks", "OFT"), ("lora_magnitude_vector", "DoRA as peft has it"),
         ("hada_t1", "convolution"), ("reshape_weight", "size")],
    )  # fmt: skip
    def test_kinds_that_are_not_read(self, flux2, path, end, what):
        save_file({f"transformer_blocks.0.attn.to_q.{end}": torch.ones(2, 2)}, path)
        assert what in refused(flux2, path)
        assert f"to_q.{end} in {path}" in refused(flux2, path)

    def test_no_file(self, flux2, path):
        assert f"{path} is missing" in refused(flux2, path)
        assert "is not a .safetensors file" in refused(flux2, path.with_suffix(".pt"))

    @pytest.mark.parametrize(
        "loras", [["a.safetensors"], [("a.safetensors",)], [("a", "b")], [("a.safetensors", math.inf)]]
    )
    def test_what_is_no_list_of_files_and_strengths(self, flux2, loras):
        with pytest.raises(ValueError, match=r"\(file, strength\)|a strength of inf"):
            set_lora(flux2, loras)

    def test_weights_that_cannot_be_changed(self, path):
        model = MODELS["flux2"]()
        layer = model.transformer_blocks[0].attn.to_q
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.to_q.weight .* stored as float8_e4m3fn"):
            set_lora(model, [])

    def test_before_a_layout(self, path):
        model = MODELS["flux2"]()
        kind = kind_of(model)
        write_lora(path, "diffusers", kind, factors_of(model, kind))
        set_lora(model, [(path, 1.0)])
        with pytest.raises(ValueError, match=r"set_lora\(pipe, \[\]\).* after enable_cache"):
            enable_cache(model, parallelism_config=ParallelismConfig())
        set_lora(model, [])
        enable_cache(model, parallelism_config=ParallelismConfig())


def refused(model: Any, path: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(path.stem)) as caught:
        read_loras(kind_of(model), dict(model.config), [(path, 1.0)])
    return str(caught.value)
