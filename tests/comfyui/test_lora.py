"""ComfyUI's own LoRA loaders on a parallel MODEL: what stock gives on the same files, and undone to the bit."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.errors import relative_error
from tests.single_file import flux2_tensors, to_fp8, write

from .graphs import Graph, add_loader, add_prompt, add_sampler, save_latent, unload
from .lora_files import FILE, HEADS, LAYOUTS, PARITY, RANK, SHAPES, STYLES, draw, ours, random, with_loras, write_loras
from .processes import worker_ranks
from .server import ComfyServer, PromptRejected
from .test_errors import failure


@pytest.fixture(scope="module")
def loras(server: ComfyServer) -> dict[str, str]:
    return write_loras(server)


# Whole weights are changed as parts of them are; what comes of it on each layout is one style's to show.
@pytest.mark.parametrize(
    ("layout", "style"),
    [
        pytest.param(layout, style, marks=[] if layout == "TP-2" or style == "every layer" else [pytest.mark.thorough])
        for layout in LAYOUTS
        for style in STYLES
    ],
)
def test_the_same_as_stock(server, loras, style, layout):
    """Alternating in one prompt with the model as it is, which comes back to the bit."""
    on = [(loras[style], 0.8)]
    before, with_it, after, theirs = draw(server, (layout, []), (layout, on), (layout, []), ("stock", on))
    assert relative_error(with_it, theirs) <= PARITY
    assert relative_error(with_it, before) > 100 * PARITY
    assert torch.equal(after, before)


def test_several_and_other_strengths(server, loras):
    several = [(loras["every layer"], 0.5), (loras["kohya"], -1.0), (loras["diffusers"], 3.0)]
    changed = [(loras["every layer"], 1.0), *several[1:]]
    first, second, theirs, theirs_changed = draw(
        server, ("TP-2", several), ("TP-2", changed), ("stock", several), ("stock", changed)
    )
    assert relative_error(first, theirs) <= PARITY
    assert relative_error(second, theirs_changed) <= PARITY
    assert relative_error(first, second) > 100 * PARITY


def test_sixteen_in_a_row_in_all_numbers(server, loras):
    """The first of rank 256 in fp16, the second in fp8."""
    for name, rank, dtype in (("fp16", 256, torch.float16), ("fp8", RANK, torch.float8_e4m3fn)):
        tensors = {}
        for key in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear2"):
            rows, columns = SHAPES[f"{key}.weight"]
            tensors[f"diffusion_model.{key}.lora_A.weight"] = (random(rank, columns) / columns**0.5).to(dtype)
            tensors[f"diffusion_model.{key}.lora_B.weight"] = (random(rows, rank) / rank**0.5).to(dtype)
        save_file(tensors, server.models / "loras" / f"numbers-{name}.safetensors")
    first = [("numbers-fp16.safetensors", 0.3), ("numbers-fp8.safetensors", -0.3)]
    sixteen = first + [(loras["kohya" if number % 2 else "diffusers"], 0.1 + number / 50) for number in range(14)]
    mine, two, fp16, theirs = draw(server, ("TP-2", sixteen), ("TP-2", first), ("TP-2", first[:1]), ("stock", sixteen))
    assert relative_error(mine, theirs) <= PARITY
    assert all(relative_error(one, other) > 100 * PARITY for one, other in ((mine, two), (two, fp16)))


def test_it_lasts(server, loras):
    """After its group was killed, after ComfyUI has asked for all memory or for models', and on another layout."""
    on = [(loras["kohya"], 1.0)]
    (wanted,) = draw(server, ("TP-2", on))
    for process in worker_ranks(server):
        os.kill(process, signal.SIGKILL)
    server.post("/free", {"unload_models": False, "free_memory": True})
    (again,) = draw(server, ("TP-2", on))
    assert torch.equal(again, wanted)
    server.post("/free", {"unload_models": True, "free_memory": True})
    (again,) = draw(server, ("TP-2", on))
    assert torch.equal(again, wanted)
    unload(server)
    (elsewhere,) = draw(server, ("Ulysses-2", on))
    assert relative_error(elsewhere, wanted) <= PARITY
    before, again, after = draw(server, ("TP-2", []), ("TP-2", on), ("TP-2", []))
    assert torch.equal(again, wanted)
    assert torch.equal(before, after)


def test_files_that_are_gone(server, loras):
    """The LoRA's or the model's: it is named, and when it is there again all is well."""
    name, model = "passing.safetensors", "passing-model.safetensors"
    shutil.copy(server.models / "loras" / loras["kohya"], server.models / "loras" / name)
    file = server.models / "diffusion_models" / model
    shutil.copy(file.with_name(FILE), file)
    before, wanted = draw(server, ("TP-2", []), ("TP-2", [(name, 1.0)]), file=model)
    (server.models / "loras" / name).unlink()
    with pytest.raises(PromptRejected, match=name):
        draw(server, ("TP-2", [(name, 0.5)]), file=model)
    (again,) = draw(server, ("TP-2", [(loras["kohya"], 1.0)]), file=model)
    assert torch.equal(again, wanted)
    gone = file.with_suffix(".gone")
    file.rename(gone)
    with pytest.raises(PromptRejected, match=model):
        draw(server, ("TP-2", [(loras["lycoris"], 0.5)]), file=model)
    gone.rename(file)
    (clean,) = draw(server, ("TP-2", []), file=model)
    assert torch.equal(clean, before)


def test_beside_weights_in_8_bits(server, loras):
    """Nearer to the file's own values with the LoRA than stock, which rounds the sum to 8 bits again."""
    stored, metadata = to_fp8(flux2_tensors(heads=HEADS), "metadata")
    write(server.models / "diffusion_models" / "lora-fp8.safetensors", stored, metadata=metadata)
    write(server.models / "diffusion_models" / "lora-exact.safetensors", exactly(stored))
    on = [(loras["every layer"], 0.3), (loras["diffusers"], 1.0)]
    plain, with_it = draw(server, ("TP-2", []), ("TP-2", on), file="lora-fp8.safetensors")
    (rounded,) = draw(server, ("stock", on), file="lora-fp8.safetensors")
    (exact,) = draw(server, ("stock", on), file="lora-exact.safetensors")
    assert relative_error(with_it, exact) < 0.2 * relative_error(rounded, exact)
    assert relative_error(with_it, plain) > 10 * relative_error(with_it, exact)
    assert torch.equal(*draw(server, ("TP-2", []), ("TP-2", []), file="lora-fp8.safetensors"))


def exactly(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file's weights stand for."""
    scales = {key.removesuffix("_scale"): value for key, value in stored.items() if key.endswith(".weight_scale")}
    return {
        key: tensor.float() * scales.get(key, torch.tensor(1.0))
        for key, tensor in stored.items()
        if not key.endswith(".weight_scale")
    }


def refusal(server: ComfyServer, name: str, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, server.models / "loras" / f"{name}.safetensors")
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    model = with_loras(graph, ours(graph, "TP-2"), (f"{name}.safetensors", 1.0))
    save_latent(graph, add_sampler(graph, model, model=model, positive=positive))
    return failure(server, graph, model)


def test_what_cannot_be_is_refused_at_the_loader(server, loras):
    key = "double_blocks.0.img_attn.proj"
    layer, (rows, columns) = f"diffusion_model.{key}", SHAPES[f"{key}.weight"]
    good = {f"{layer}.lora_A.weight": random(RANK, columns), f"{layer}.lora_B.weight": random(rows, RANK)}
    text = refusal(server, "boft", {f"{layer}.oft_blocks": random(2, 8, 32, 32), f"{layer}.alpha": torch.ones(())})
    assert f"{key}.weight is changed by BOFT" in text
    assert "LoRA, LoCon, LoHa, LoKr" in text
    text = refusal(server, "wide", good | {f"{layer}.lora_A.weight": random(RANK, columns + 8)})
    assert "1 of 1 weights that the LoRA changes have another size" in text
    assert f"[{rows}, {columns + 8}], the model [{rows}, {columns}]" in text
    other = {name.replace(key, "blocks.0.self_attn.q"): tensor for name, tensor in good.items()}
    assert "for another model" in refusal(server, "other", other)


def test_numbers_that_are_none_are_refused(server, loras):
    layer = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{layer}.lora_A.weight": random(RANK, 256), f"{layer}.lora_B.weight": random(256, RANK)}
    tensors[f"{layer}.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, server.models / "loras" / "nan.safetensors")
    graph = Graph()
    positive = add_prompt(graph, add_loader(graph))
    model = with_loras(graph, ours(graph, "TP-2"), ("nan.safetensors", 1.0))
    sampler = add_sampler(graph, model, model=model, positive=positive)
    save_latent(graph, sampler)
    assert "double_blocks.0.img_attn.proj.weight holds values that are not finite" in failure(server, graph, sampler)
    before, after = draw(server, ("TP-2", []), ("TP-2", [(loras["kohya"], 1.0)]))
    assert relative_error(before, after) > 100 * PARITY
