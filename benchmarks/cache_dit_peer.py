"""cache-dit 1.5.3 as the benchmarks run it: its public calls, and what it needs to take a model's inputs."""

from __future__ import annotations

from typing import Any

import torch

from parallel_backend.bench.model import fill, transformer_config
from parallel_backend.bench.rank import Task
from parallel_backend.bench.shapes import Shape, shape_of
from parallel_backend.cache.config import CacheSettings, parse_cache
from parallel_backend.config import ParallelismConfig
from parallel_backend.families import Family, Model
from parallel_backend.mesh import ParallelMesh


def peer_cache(settings: CacheSettings) -> Any:
    """A block cache that follows a mask, for cache-dit."""
    import cache_dit

    config = settings.config
    return cache_dit.DBCacheConfig(
        Fn_compute_blocks=config.Fn_compute_blocks,
        Bn_compute_blocks=config.Bn_compute_blocks,
        max_warmup_steps=config.max_warmup_steps,
        num_inference_steps=len(config.steps_computation_mask or ()),
        steps_computation_mask=list(config.steps_computation_mask or ()),
        steps_computation_policy=config.steps_computation_policy,
    )


def parallelize_peer(
    model: Model, layout: ParallelismConfig, attention: str, uneven: bool, cache: CacheSettings | None
) -> None:
    """cache-dit's public way, with the degrees of a layout."""
    import cache_dit

    if cache is not None:  # for a transformer alone, cache-dit 1.5.3 does not take both in one call
        cache_dit.enable_cache(model, cache_config=peer_cache(cache))
    if layout.world_size == 1:
        cache_dit.set_attn_backend(model, attention)
        return
    degrees = {
        name: degree
        for name in ("ulysses_size", "ring_size", "tp_size")
        if (degree := getattr(layout, name)) > 1  # it has None for "not asked for"
    }
    if uneven and layout.ulysses_size > 1:
        degrees["ulysses_anything"] = True
    config = cache_dit.ParallelismConfig(**degrees)
    cache_dit.enable_cache(model, parallelism_config=config, attention_backend=attention)


def mend_peer(model: Model, head_dim: int) -> bool:
    """Repair what keeps cache-dit 1.5.3 from running Qwen-Image under tensor parallelism; False if that is not it.

    It divides an attention's ``heads``, but not ``inner_dim``; diffusers 0.42 takes a head's width from their ratio.
    """
    broken = [
        module
        for block in model.transformer_blocks
        if hasattr(module := block.attn, "inner_dim") and module.inner_dim != module.heads * head_dim
    ]
    for module in broken:
        module.inner_dim = module.heads * head_dim
    return bool(broken)


def adapt_inputs_to_peer(model: Model, inputs: dict[str, Any], x: torch.Tensor) -> None:
    """What diffusers' forward takes as it is, where ours takes something else."""
    for name in ("img_ids", "txt_ids"):  # cache-dit's plan for FLUX.2 wants them with a batch
        if name in inputs:
            inputs[name] = inputs[name][None]
    if "img_shapes" in inputs:
        inputs["img_shapes"] = [[(1, *(-(-side // model.config.patch_size) for side in x.shape[-2:]))]]
        # Its tables of positions are no buffers, so that they came to be on the meta device.
        model.pos_embed = type(model.pos_embed)(10000, list(model.config.axes_dims_rope), scale_rope=True)


def build_peer(task: Task, attention: str, inputs: dict[str, Any], x: torch.Tensor, figures: dict[str, Any]) -> Model:
    """The peer's part of a rank, with weights of its own."""
    family, config = transformer_config(shape_of(task.shape), task.blocks)
    device, dtype, layout = torch.device(task.device), getattr(torch, task.dtype), task.layout
    model = family.transformer.build(config)
    # Its planners want real weights, so the model is there in whole first. Rank-only, its shards come out of a scatter,
    # which moves nothing: they are filled anew.
    fill(model, device, dtype)
    adapt_inputs_to_peer(model, inputs, x)
    tokens = (inputs["hidden_states"].shape[1], task.text)
    uneven = any(count % layout.cp_size for count in tokens)
    if uneven and layout.ulysses_size > 1:
        figures["note"] = "ulysses_anything, since tokens do not divide"
    parallelize_peer(model, layout, attention, uneven, None if task.cache is None else parse_cache(task.cache))
    fill(model, device, dtype)
    if task.compile:
        model.compile_repeated_blocks()
    return model


def build_peer_text_model(shape: Shape, mesh: ParallelMesh, dtype: torch.dtype) -> tuple[Model, Family, Any] | None:
    """The peer's part of a shape's text encoder, sharded over all ranks in its public way; None where there is none."""
    if shape.text_config is None:
        return None
    family, _ = transformer_config(shape)
    config = shape.text_config or family.reference_model.text_config
    model = family.needs_text_encoder().build(config)
    fill(model, torch.device(mesh.device_type), dtype)
    if mesh.world.is_split:
        import cache_dit
        from cache_dit.distributed.text_encoders import parallelize_text_encoder

        # What its `extra_parallel_modules` does, which takes a transformer along.
        parallelize_text_encoder(
            text_encoder=model, parallelism_config=cache_dit.ParallelismConfig(tp_size=mesh.world.degree)
        )
    return model, family, config
