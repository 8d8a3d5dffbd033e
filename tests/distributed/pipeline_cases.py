"""What the ranks run for test_enable_cache: diffusers' own Flux2Pipeline, made parallel by enable_cache."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Pipeline

from parallel_backend import ModelAdapter, ParallelismConfig, disable_cache, enable_cache
from parallel_backend.mesh import ParallelMesh
from tests.errors import relative_error

from .cases import flux2_inputs, text_ids, tiny_text_encoder, tiny_transformer


@functools.cache
def _untouched(folder: str) -> Flux2Pipeline:
    pipe = Flux2Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh_pipeline(folder: str) -> Flux2Pipeline:
    """A pipeline whose transformer and text encoder nobody else has; the files are read once a process."""
    components = dict(_untouched(folder).components)
    for name in ("transformer", "text_encoder"):
        components[name] = copy.deepcopy(components[name])
    pipe = Flux2Pipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Flux2Pipeline) -> torch.Tensor:
    """Two steps of the pipeline at 64 x 64."""
    return pipe(
        prompt="a red circle on a blue square",
        num_inference_steps=2,
        width=64,
        height=64,
        output_type="latent",
        text_encoder_out_layers=(1, 2, 4),
        generator=torch.Generator().manual_seed(3),
    ).images


def _with_extra(layout: ParallelismConfig, spelling: str, pipe: Any) -> ParallelismConfig:
    """A layout that also names the text encoder, in one of the ways that users write it."""
    degrees = dict(ulysses_size=layout.ulysses_size, ring_size=layout.ring_size, tp_size=layout.tp_size)
    match spelling:
        case "none":
            return ParallelismConfig(**degrees)
        case "modules":
            return ParallelismConfig(**degrees, extra_parallel_modules=[pipe.text_encoder])
        case "names":
            return ParallelismConfig(**degrees, extra_parallel_modules=["text_encoder"])
        case "parallel_kwargs":
            return ParallelismConfig(**degrees, parallel_kwargs={"extra_parallel_modules": [pipe.text_encoder]})
        case "module and name":
            return ParallelismConfig(**degrees, extra_parallel_modules=[pipe.text_encoder, "text_encoder"])
    raise AssertionError(spelling)


def _elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pipeline_latents(mesh: ParallelMesh, layout: ParallelismConfig, folder: str, spelling: str) -> dict[str, Any]:
    """Latents of the parallel pipeline, and the share of the weights that this rank holds."""
    pipe = fresh_pipeline(folder)
    full = {name: _elements(getattr(pipe, name)) for name in ("transformer", "text_encoder")}
    classes = (type(pipe), type(pipe.transformer), type(pipe.text_encoder))
    returned = enable_cache(pipe, parallelism_config=_with_extra(layout, spelling, pipe))
    assert returned is pipe
    assert (type(pipe), type(pipe.transformer), type(pipe.text_encoder)) == classes
    share = {name: _elements(getattr(pipe, name)) / full[name] for name in full}
    return {"latents": latents(pipe), "share": share}


def bare_models_error(mesh: ParallelMesh, layout: ParallelismConfig, adapter: bool) -> float:
    """Largest relative error of a bare transformer, or of both models of an adapter, against the untouched ones."""
    transformer, encoder = tiny_transformer(), tiny_text_encoder(kv_heads=4)
    inputs = flux2_inputs(5, [(3, 5)], 2)
    ids, mask = text_ids(1, 9)
    expected = transformer(**inputs).sample
    expected_text = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    if adapter:
        model: Any = ModelAdapter(transformer=transformer, text_encoder=encoder)
        config = _with_extra(layout, "names", model)
    else:
        model, config = transformer, layout
    assert enable_cache(model, parallelism_config=config) is model
    errors = [relative_error(transformer(**inputs).sample, expected)]
    if adapter:
        actual = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        errors += [relative_error(a, e) for a, e in zip(actual, expected_text, strict=True)]
    return max(errors)


def second_call(mesh: ParallelMesh, layout: ParallelismConfig) -> tuple[str, float]:
    """The message of a second enable_cache, and the relative error of the model after it."""
    model, inputs = tiny_transformer(), flux2_inputs(5, [(3, 5)], 1)
    expected = model(**inputs).sample
    enable_cache(model, parallelism_config=layout)
    message = _refusal(model, parallelism_config=layout)
    return message, relative_error(model(**inputs).sample, expected)


def enabled_and_disabled(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, Any]:
    """What is left of enable_cache after disable_cache, and whether both can be repeated."""
    model, inputs = tiny_transformer(), flux2_inputs(5, [(3, 5)], 1)
    before, attributes = model(**inputs).sample, set(vars(model))
    errors = []
    for _ in range(2):
        enable_cache(model, parallelism_config=layout)
        errors.append(relative_error(model(**inputs).sample, before))
        assert all("forward" in vars(block) for block in model.transformer_blocks)
        assert disable_cache(model) is model
    return {
        "errors": errors,
        "same bits": torch.equal(model(**inputs).sample, before),
        "own forwards": not any("forward" in vars(module) for module in model.modules()),
        "hooks": len(model._forward_hooks) + len(model._forward_pre_hooks),
        "new attributes": sorted(set(vars(model)) - attributes),
    }


def disable_after_tp(mesh: ParallelMesh, layout: ParallelismConfig) -> tuple[str, float]:
    """The message of disable_cache where weights are sharded, and the relative error of the model after it."""
    model, inputs = tiny_transformer(), flux2_inputs(5, [(3, 5)], 1)
    expected = model(**inputs).sample
    enable_cache(model, parallelism_config=layout)
    try:
        disable_cache(model)
        message = "nothing was refused"
    except ValueError as error:
        message = str(error)
    return message, relative_error(model(**inputs).sample, expected)


def saved_after_tp(mesh: ParallelMesh, layout: ParallelismConfig, folder: str, target: str) -> list[str]:
    """What is said to attempts to save or copy sharded models: nothing of them may be written."""
    pipe = fresh_pipeline(folder)
    enable_cache(pipe, parallelism_config=_with_extra(layout, "names", pipe))
    said = []
    assert "push_to_hub" in vars(pipe.transformer), "it would ask a server first"
    for attempt in (
        lambda: pipe.transformer.save_pretrained(target),
        lambda: pipe.text_encoder.save_pretrained(target),
        lambda: pipe.transformer.push_to_hub("nobody/nothing"),
        lambda: pipe.save_pretrained(target),
        lambda: copy.deepcopy(pipe.transformer),
        lambda: copy.deepcopy(pipe.text_encoder),
    ):
        try:
            attempt()
            said.append("nothing was refused")
        except ValueError as error:
            said.append(str(error))
    assert {file.parent.name for file in Path(target).rglob("*.safetensors")} <= {"vae"}  # which is whole
    return said


def _refusal(*args: Any, **kwargs: Any) -> str:
    try:
        enable_cache(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(mesh: ParallelMesh, layout: ParallelismConfig) -> dict[str, str]:
    """What enable_cache says to what it cannot do; the models must be as they were."""
    transformer, encoder = tiny_transformer(), tiny_text_encoder(kv_heads=4)
    inputs = flux2_inputs(5, [(3, 5)], 1)
    before = transformer(**inputs).sample
    adapter = ModelAdapter(transformer, encoder)

    def extra(*modules: Any) -> ParallelismConfig:
        return ParallelismConfig(ulysses_size=4, tp_size=2, extra_parallel_modules=modules)

    said = {
        "product": _refusal(transformer, parallelism_config=ParallelismConfig(ulysses_size=2, tp_size=2)),
        "object": _refusal({"transformer": transformer}, parallelism_config=layout),
        "class": _refusal(torch.nn.Linear(2, 2), parallelism_config=layout),
        "missing name": _refusal(adapter, parallelism_config=extra("text_encoder_2")),
        "extra class": _refusal(adapter, parallelism_config=extra(torch.nn.Linear(2, 2))),
        "heads": _refusal(tiny_transformer(num_attention_heads=4, joint_attention_dim=48), parallelism_config=layout),
    }
    enable_cache(ModelAdapter(tiny_transformer(), encoder), parallelism_config=extra("text_encoder"))
    said["extra twice"] = _refusal(adapter, parallelism_config=extra("text_encoder"))
    assert torch.equal(transformer(**inputs).sample, before), "a refused model was changed"
    return said
