"""What the ranks run for test_set_lora: LoRA files on sharded transformers, on and off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel_backend import disable_cache, enable_cache, set_lora
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import family_of_transformer
from parallel_backend.lora import LORA
from parallel_backend.mesh import ParallelMesh
from parallel_backend.parallelize import parallelize_transformer
from tests.errors import relative_error
from tests.lora_files import added, distance, factors_of

from . import cases, pipeline_cases, qwen_cases, z_image_cases

MODELS = {
    "flux2": cases.tiny_transformer,
    "qwen_image": qwen_cases.tiny_transformer,
    "z_image": z_image_cases.tiny_transformer,
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    return MODELS[family]()


def kind_of(model: Any) -> Any:
    return family_of_transformer(type(model).__name__).transformer


def sharded(mesh: ParallelMesh, layout: ParallelismConfig, family: str) -> tuple[Any, dict[str, Any]]:
    model = build(family)
    return model, parallelize_transformer(model, kind_of(model), layout, mesh)


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def error(model: Any, table: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> float:
    """The largest of a rank's weights against its slices of whole ones."""
    return max(
        distance(weight, table[name].take(wanted[name]) if name in table else wanted[name])
        for name, weight in model.named_parameters()
    )


def on_and_off(mesh: ParallelMesh, layout: ParallelismConfig, family: str, files: list[str]) -> dict[str, Any]:
    """Two files, other strengths, one of them, none."""
    whole = build(family)
    clean, kind = state_of(whole), kind_of(whole)
    factors = [factors_of(whole, kind, seed) for seed in (1, 2)]
    model, table = sharded(mesh, layout, family)
    before, places = state_of(model), {name: weight.data_ptr() for name, weight in model.named_parameters()}
    found: dict[str, Any] = {"errors": []}
    for strengths in ((0.7, -0.4), (0.2, 1.5), (0.0, 1.0)):
        set_lora(model, list(zip(files, strengths, strict=True)))
        found["errors"].append(error(model, table, added(clean, *zip(factors, strengths, strict=True))))
    kept = getattr(model, LORA).weights
    found["kept"] = sum(weight.nbytes for weight in kept.values())
    found["changed"] = sum(before[name].nbytes for name in getattr(model, LORA).names)
    set_lora(model, [])
    found["same bits"] = all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    found["same memory"] = places == {name: weight.data_ptr() for name, weight in model.named_parameters()}
    found["left"] = hasattr(model, LORA)
    return found


def forward_error(mesh: ParallelMesh, layout: ParallelismConfig, files: list[str]) -> tuple[float, float]:
    """Of a sharded FLUX.2 with LoRAs against a whole one that they are merged into, and against it without them."""
    whole, inputs = build("flux2"), cases.flux2_inputs(7, [(5, 7), (3, 4)], 2)
    plain = whole(**inputs).sample
    factors = [factors_of(whole, kind_of(whole), seed) for seed in (1, 2)]
    whole.load_state_dict(added(whole.state_dict(), (factors[0], 0.7), (factors[1], -0.4)))
    model, _ = sharded(mesh, layout, "flux2")
    set_lora(model, [(files[0], 0.7), (files[1], -0.4)])
    output = model(**inputs).sample
    return relative_error(output, whole(**inputs).sample), relative_error(output, plain)


def missing_on_one_rank(mesh: ParallelMesh, layout: ParallelismConfig, file: str) -> tuple[str, bool, float]:
    """What all ranks say where one lacks the file, whether weights are as before, and the error of the next try."""
    whole = build("flux2")
    clean, factors = state_of(whole), factors_of(whole, kind_of(whole), 1)
    model, table = sharded(mesh, layout, "flux2")
    before = state_of(model)
    path = Path(file)
    text = "nothing was refused"
    try:
        set_lora(model, [(path if mesh.world.rank != 1 else path.with_name("gone.safetensors"), 1.0)])
    except ValueError as found:
        text = str(found)
    same = all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    set_lora(model, [(path, 1.0)])
    return text, same, error(model, table, added(clean, (factors, 1.0)))


def fused_before(mesh: ParallelMesh, layout: ParallelismConfig, folder: str, file: str) -> tuple[Any, str, str]:
    """Latents of a parallel pipeline that diffusers has fused a LoRA into; what is said where its layers are left."""
    pipe = pipeline_cases.fresh_pipeline(folder)
    pipe.load_lora_weights(file)
    said = []
    for call in (lambda: enable_cache(pipe, parallelism_config=layout), lambda: set_lora(pipe, [])):
        try:
            call()
        except ValueError as found:
            said.append(str(found))
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    enable_cache(pipe, parallelism_config=layout)
    return pipeline_cases.latents(pipe), *said


def set_after(mesh: ParallelMesh, layout: ParallelismConfig, folder: str, file: str) -> Any:
    """Latents of a parallel pipeline with the LoRA put on after it was made so."""
    pipe = pipeline_cases.fresh_pipeline(folder)
    enable_cache(pipe, parallelism_config=layout)
    assert set_lora(pipe, [(file, 0.7)]) is pipe
    return pipeline_cases.latents(pipe)


def off_after_disabling(mesh: ParallelMesh, layout: ParallelismConfig, file: str) -> bool:
    """Whether the weights come back of which the ranks keep a share each, when the layout is gone."""
    model, _ = sharded(mesh, layout, "flux2")
    before = state_of(model)
    set_lora(model, [(file, 1.0)])
    changed = any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    disable_cache(model)
    set_lora(model, [])
    return changed and all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
