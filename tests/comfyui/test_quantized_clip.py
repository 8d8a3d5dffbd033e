"""Text encoders from quantized files: the conditioning of ComfyUI's own, on one worker and on two."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import text_encoder_file, umt5_file
from tests.errors import relative_error
from tests.quantized_file import needs_kitchen, quantize
from tests.single_file import to_fp8, write

from .graphs import Graph, add_layout, run_well
from .qwen_models import CONFIG
from .test_load_clip import PARITY, save_conditioning, saved_conditioning

pytestmark = [needs_kitchen, pytest.mark.timeout(300)]
TEXT = "a red circle on a blue square"
HIDDEN = 256
"""Of which one group of columns is that is rotated together."""
UMT5 = {"hidden": HIDDEN, "heads": 32, "mlp": 384}
TYPES = {"mistral": "flux2", "qwen": "qwen_image", "umt5": "wan"}
LAYOUTS = ({"ulysses": 1, "tp": 1}, {"ulysses": 1, "tp": 2})
FORMATS = ("nvfp4", "int8_convrot", "fp8")
ROWS = 4e-3
"""Rows of a table of tokens are rounded to bf16 by ComfyUI where that is quantized."""
TYPICAL = (("mistral", "nvfp4"), ("qwen", "int8_convrot"))


def tensors_of(encoder, qwen):
    """A small encoder's, by ComfyUI's names."""
    if encoder == "mistral":
        return text_encoder_file.text_tensors(hidden=HIDDEN)
    if encoder == "umt5":
        return umt5_file.umt5_tensors(**UMT5)
    return load_file(qwen.models / "text_encoders" / "qwen.safetensors")


def is_quantized(name, tensor, form):
    """Linears that a format can be had of, and the table of tokens where ComfyUI looks rows of a format up."""
    if tensor.ndim != 2 or "relative" in name or "visual" in name or tensor.shape[1] % HIDDEN:
        return False
    return form != "nvfp4" if name in ("model.embed_tokens.weight", "shared.weight") else True


def write_files(folder, name, tensors, form):
    """A file, and beside it what its weights stand for; the names of what is quantized in it.

    The rest is in bf16, which ComfyUI takes for the number format of all: it makes weights dense where inputs, in fp32,
    are of another.
    """
    chosen = {key: tensor for key, tensor in tensors.items() if is_quantized(key, tensor, form)}
    if form == "fp8":
        stored, _ = to_fp8(chosen, "comfy_quant", part="")
        meant = {key: stored[key].float() * stored[f"{key}_scale"] for key in chosen}
    else:
        stored, _, meant = quantize(chosen, form, part="", smooth=form == "nvfp4")
    rest = {key: tensor for key, tensor in tensors.items() if key not in chosen}
    rest = {key: tensor.bfloat16() if tensor.is_floating_point() else tensor for key, tensor in rest.items()}
    write(folder / name, {**rest, **stored})
    write(folder / f"meant-{name}", {**{key: widened(tensor) for key, tensor in rest.items()}, **meant})
    return chosen.keys()


def widened(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def add_stock(graph, encoder, name):
    if encoder == "qwen":
        return graph.add("ReferenceQwenClip", clip_name=name, config=json.dumps(CONFIG))
    config = umt5_file.comfy_config(**UMT5) if encoder == "umt5" else text_encoder_file.comfy_config(hidden=HIDDEN)
    return graph.add("ReferenceTextEncoder", clip_name=name, type=TYPES[encoder], config=json.dumps(config))


@pytest.mark.parametrize(
    ("encoder", "form"),
    [pytest.param(encoder, form, marks=[] if (encoder, form) in TYPICAL else [pytest.mark.thorough])
     for encoder in TYPES for form in FORMATS],
)  # fmt: skip
def test_the_same_conditioning(qwen, encoder, form):
    """ComfyUI's own text encoders make weights dense in fp32 in every format, and so do ours."""
    folder = qwen.models / "text_encoders"
    name, tensors = f"{encoder}-{form}.safetensors", tensors_of(encoder, qwen)
    quantized = write_files(folder, name, tensors, form)
    assert len(quantized) >= 3 * 5
    write(folder / f"{encoder}-exact.safetensors", tensors)
    graph = Graph()
    clips = [
        graph.add("HybridDiT_LoadCLIP", clip_name=name, type=TYPES[encoder], layout=add_layout(graph, **layout))
        for layout in LAYOUTS
    ]
    clips += [add_stock(graph, encoder, file) for file in (name, f"meant-{name}", f"{encoder}-exact.safetensors")]
    nodes = [save_conditioning(graph, graph.add("CLIPTextEncode", text=TEXT, clip=clip)) for clip in clips]
    result = run_well(qwen, graph)
    *ours, theirs, meant, exact = (saved_conditioning(qwen, result, node) for node in nodes)
    for found in ours:
        assert set(found) == set(theirs) == set(meant)
        for key, tensor in meant.items():
            assert relative_error(found[key], tensor) <= PARITY, key
        looked_up = any("layers" not in key and "block" not in key for key in quantized)
        assert relative_error(found["cond"], theirs["cond"]) <= (ROWS if looked_up else PARITY)
    # What is compared is the file's own: its rounding is seen.
    assert relative_error(meant["cond"], exact["cond"]) > 2 * ROWS
    assert torch.isfinite(exact["cond"]).all()
