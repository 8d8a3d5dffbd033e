"""enable_cache and disable_cache: the recipe that turns a pipeline or model into a parallel one, read top to bottom."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from .cache.block_cache import BlockCache, count_blocks
from .cache.config import CacheSettings, DBCacheConfig, TaylorSeerCalibratorConfig
from .cache.pipeline_cache import PipelineCache
from .config import AS_IT_IS, ParallelismConfig, Speed
from .families import Family, Model, TextEncoder, Transformer, family_of_transformer
from .mesh import SINGLE, Axis, ParallelMesh, axis_among, build_mesh
from .parallel import copies
from .parallel.attention import ShardedAttention
from .parallel.modulation import gather_together
from .parallel.sequence import Entrance, SequenceShards, shard_sequence
from .parallel.tensor import ParamShard, apply_tensor_parallel, coarser, whole_blocks

_STATE = "_hybrid_parallel"
_CACHE = "_hybrid_cache"
LORA = "_hybrid_lora"
"""Attribute of a transformer whose weights `set_lora` has changed."""


@dataclass
class ModelAdapter:
    """The modules of one model that are to be parallelised, for callers who have no diffusers pipeline.

    Args:
        transformer: the diffusion transformer.
        text_encoder: its text encoder, if that is to be sharded too.
        scheduler: a diffusers scheduler, set to new timesteps for each picture: the cache tells pictures apart by it,
            and how many steps they have. Without one a picture ends where the timestep rises again.
    """

    transformer: Model
    text_encoder: Model | None = None
    scheduler: Any = None


@dataclass
class ParallelState:
    """What was done to a model, kept on the instance so that it can be told and undone."""

    layout: ParallelismConfig
    mesh: ParallelMesh
    hooks: list[Any] = field(default_factory=list)
    table: dict[str, ParamShard] = field(default_factory=dict)


def enable_cache(
    pipe_or_model: Any,
    cache_config: DBCacheConfig | None = None,
    *,
    calibrator_config: TaylorSeerCalibratorConfig | None = None,
    parallelism_config: ParallelismConfig | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    copy_engines: bool = False,
) -> Any:
    """Parallelise and cache a diffusers pipeline, a transformer or a `ModelAdapter` in place.

    Args:
        pipe_or_model: what to work on; classes stay as they are, only these instances change.
        cache_config: thresholds of the block cache; None computes each step in full.
        calibrator_config: has cached steps extrapolate; needs a `cache_config`.
        parallelism_config: degrees whose product is the number of ranks of the torchrun job, all of which make this
            call; None leaves the model whole.
        compile: run each kind of block as one graph of torch.compile, which takes a minute or so in the first step;
            other sizes and prompts use the same graph. Needs a `parallelism_config` (of one rank, if there is but one).
        cuda_graphs: run all blocks of a step as one CUDA graph, which spares the host; needs a `parallelism_config`
            too. Steps that a cache decides about run without it.
        copy_engines: have GPUs that reach each other's memory exchange by copies; others warn, and go on with NCCL.

    Returns:
        ``pipe_or_model``.

    Raises:
        ValueError: an unsupported model, degrees that do not fit the ranks or the model, thresholds that do not fit
            the model, a second call on the same object, or no initialised process group.
    """
    speed = Speed(compile, cuda_graphs, copy_engines)
    if calibrator_config is not None and cache_config is None:
        raise ValueError("calibrator_config without cache_config: there are no cached steps to calibrate")
    if speed != AS_IT_IS and parallelism_config is None:
        raise ValueError(
            "compile, cuda_graphs or copy_engines without parallelism_config: for one GPU give ParallelismConfig()"
        )
    if parallelism_config is None and cache_config is None:
        return pipe_or_model

    transformer = transformer_of(pipe_or_model)
    if hasattr(transformer, _CACHE):
        raise ValueError(
            f"this {type(transformer).__name__} has a cache already; call disable_cache on it first, and give "
            "cache_config and parallelism_config in one call"
        )
    if hasattr(transformer, _STATE):
        state: ParallelState = getattr(transformer, _STATE)
        raise ValueError(
            f"this {type(transformer).__name__} is parallel already ({state.layout.describe()}); "
            "call disable_cache on it first, or load it anew where its weights are sharded"
        )
    if parallelism_config is not None and hasattr(transformer, LORA):
        raise ValueError(
            f"set_lora has changed the weights of this {type(transformer).__name__}; take the LoRAs off with "
            "set_lora(pipe, []), and put them on after enable_cache"
        )
    family = family_of_transformer(type(transformer).__name__)
    if cache_config is not None:
        blocks = count_blocks(transformer, family.transformer.block_stacks)
        cache_config.check_blocks(blocks, f"this {type(transformer).__name__}")

    axis = SINGLE
    if parallelism_config is not None:
        if parallelism_config.tp_size > 1:
            refuse_peft(transformer)
        mesh = build_mesh(parallelism_config, copies=copies.usable(speed.copy_engines))
        axis = mesh.world
        extra = _extra_modules(pipe_or_model, transformer, parallelism_config, family)
        parallelize_transformer(transformer, family.transformer, parallelism_config, mesh, speed)
        for name, module in extra:
            parallelize_text_encoder(module, family.needs_text_encoder(), mesh, name)

    if cache_config is not None:
        cache = BlockCache(transformer, family.transformer.block_stacks, axis, family.transformer.picture_tokens)
        settings = CacheSettings(cache_config, calibrator_config)
        setattr(transformer, _CACHE, PipelineCache(cache, settings, lambda: _schedule(pipe_or_model)))
        _refuse_copies(transformer)
    return pipe_or_model


def summary(pipe_or_model: Any) -> dict[str, Any]:
    """The last run of a cached pipeline or model in figures; docs/report.md explains them (under "cache").

    Raises:
        ValueError: there is no cache, or it has not seen a run.
    """
    transformer = transformer_of(pipe_or_model)
    cache: PipelineCache | None = getattr(transformer, _CACHE, None)
    if cache is None:
        raise ValueError(f"this {type(transformer).__name__} has no cache; call enable_cache with a cache_config")
    if cache.run is None:
        raise ValueError(f"the cache of this {type(transformer).__name__} has not seen a run yet")
    return cache.run.report()


def disable_cache(pipe_or_model: Any) -> Any:
    """Undo `enable_cache` on an object and return it.

    Raises:
        ValueError: the weights are sharded over tp, so that no rank holds the original any more. (A cache is gone
            all the same.)
    """
    transformer = transformer_of(pipe_or_model)
    cache: PipelineCache | None = getattr(transformer, _CACHE, None)
    if cache is not None:
        cache.remove()
        delattr(transformer, _CACHE)
    state: ParallelState | None = getattr(transformer, _STATE, None)
    if state is None:
        _allow_copies(transformer)
        return pipe_or_model
    if state.table:
        raise ValueError(
            f"the weights of this {type(transformer).__name__} are sharded over tp_size={state.layout.tp_size} ranks: "
            "no rank holds the original. Load the model again to have it whole"
        )
    for hook in state.hooks:
        hook.remove()
    delattr(transformer, _STATE)
    _allow_copies(transformer)
    text_encoder = getattr(pipe_or_model, "text_encoder", None)
    if hasattr(text_encoder, _STATE):
        warnings.warn(
            f"the transformer is as it was, but the weights of the {type(text_encoder).__name__} stay sharded: "
            "load it again to have it whole",
            stacklevel=2,
        )
    return pipe_or_model


def parallelize_transformer(
    transformer: Model,
    kind: Transformer,
    layout: ParallelismConfig,
    mesh: ParallelMesh,
    speed: Speed = AS_IT_IS,
    unit: int = 1,
) -> dict[str, ParamShard]:
    """Shard one transformer over a mesh; its weights may be real or on the meta device.

    Args:
        transformer: changed in place.
        kind: what it is.
        layout, mesh: degrees, and the ranks.
        speed: how its blocks run.
        unit: features that its weights' number formats keep together.

    Returns:
        The slice of each sharded parameter that this rank holds; where none is sharded, all of those in `whole_blocks`.
    """
    config = dict(transformer.config)
    kind.check_layout(config, layout)
    state = ParallelState(layout, mesh)
    shards = SequenceShards(mesh)
    plan = coarser(transformer, kind.plan(config), unit, mesh.tp.degree)
    state.table = apply_tensor_parallel(transformer, plan, mesh.tp)
    gather_together(transformer, mesh.tp)
    entrance = kind.install(transformer, ShardedAttention(shards), speed)
    hooks = shard_sequence(transformer, shards, kind.sequence_inputs, kind.output_stream, entrance)
    state.hooks = [entrance, *hooks]
    setattr(transformer, _STATE, state)
    _refuse_copies(transformer, sharded=bool(state.table))
    return state.table or whole_blocks(transformer, plan)


def _refuse_copies(module: Model, sharded: bool = False) -> None:
    """Have a module refuse what would go wrong with it unseen, on this instance.

    Copies and pickles, whose blocks would compute with this module's weights; and saving a sharded one, which would
    write this rank's shard as if it were the model.
    """
    kind = type(module).__name__
    whole = "load it again to have it whole" if sharded else "call disable_cache on it first"

    def refuse_copy() -> NoReturn:
        raise ValueError(f"this {kind} cannot be copied or pickled: enable_cache has tied it to its ranks; {whole}")

    def refuse_saving(*_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"this {kind} cannot be saved: its weights are sharded, and no rank holds all; {whole}")

    # What deepcopy, copy and pickle ask an object for first.
    module.__getstate__ = refuse_copy
    if sharded:
        module.save_pretrained = module.push_to_hub = refuse_saving


def _allow_copies(module: Model) -> None:
    """Undo `_refuse_copies`, of a module that is not sharded."""
    module.__dict__.pop("__getstate__", None)


def forget_graphs(transformer: Model) -> None:
    """Forget what CUDA graphs a transformer has recorded, as its weights move or its memory is needed."""
    state: ParallelState = getattr(transformer, _STATE)
    for hook in state.hooks:
        if isinstance(hook, Entrance):
            hook.forget_graphs()


def forget_values(transformer: Model) -> None:
    """Forget what a transformer has made of its weights for later forwards: they change, or its memory is needed."""
    state = parallel_state(transformer)
    for hook in () if state is None else state.hooks:
        if isinstance(hook, Entrance):
            hook.forget_values()


def parallelize_text_encoder(text_encoder: Model, kind: TextEncoder, mesh: ParallelMesh, name: str) -> None:
    """Shard a whole, loaded text encoder over all ranks of the mesh (or over as many as its heads divide by)."""
    if hasattr(text_encoder, _STATE):
        raise ValueError(f"{name} ({type(text_encoder).__name__}) is parallel already")
    config = text_encoder.config.to_dict()
    axis, _ = text_axes(kind, config, mesh)
    shard_text_model(kind.text_model(text_encoder), kind, config, axis)
    setattr(text_encoder, _STATE, axis)
    if axis.is_split:
        _refuse_copies(text_encoder, sharded=True)


def shard_text_model(
    text_model: Model, kind: TextEncoder, config: Mapping[str, Any], axis: Axis
) -> dict[str, ParamShard]:
    """Shard the text model proper over an axis made by `text_axes`; weights may be real or on the meta device."""
    table = apply_tensor_parallel(text_model, kind.plan(config), axis)
    if axis.is_split:
        kind.localize(text_model)
    return table


def text_axes(kind: TextEncoder, config: Mapping[str, Any], mesh: ParallelMesh) -> tuple[Axis, Axis]:
    """The axis that the text encoder is sharded over, and the one of the ranks that hold the same slices of it.

    It is sharded over all ranks, or over the most that its heads divide by. Where that is fewer than all, equal groups
    of adjacent ranks hold one copy each. Collective.
    """
    ranks = mesh.world.degree
    degree = kind.degree(config, ranks)
    if degree == ranks:
        return mesh.world, SINGLE
    if degree == 1:
        return SINGLE, mesh.world
    assert mesh.world.group is not None
    members = torch.tensor(dist.get_process_group_ranks(mesh.world.group)).view(-1, degree)
    return axis_among(members), axis_among(members.T)


def refuse_peft(transformer: Model) -> None:
    """Raise ValueError for a model with layers of peft, of which a rank cannot hold a part."""
    for name, module in transformer.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ValueError(
                f"{name} of this {type(transformer).__name__} has layers of peft (load_lora_weights): call fuse_lora "
                "and unload_lora_weights on the pipeline first; or unload_lora_weights alone, and after enable_cache "
                "set_lora with the files"
            )


def parallel_state(model: Model) -> ParallelState | None:
    """What was done to a transformer; None if nothing was."""
    state: ParallelState | None = getattr(model, _STATE, None)
    return state


def _schedule(pipe_or_model: Any) -> Any:
    """The timesteps that a pipeline's scheduler is set to: each time others; None where there is no scheduler."""
    return getattr(getattr(pipe_or_model, "scheduler", None), "timesteps", None)


def transformer_of(pipe_or_model: Any) -> Model:
    """The transformer of a pipeline or adapter, or the model itself."""
    transformer = getattr(pipe_or_model, "transformer", None)
    if isinstance(transformer, nn.Module) and not isinstance(pipe_or_model, nn.Module):
        return transformer
    if isinstance(pipe_or_model, nn.Module):
        return pipe_or_model
    raise ValueError(
        f"{type(pipe_or_model).__name__} is neither a diffusers pipeline with a transformer, nor a transformer, nor a "
        "ModelAdapter"
    )


def _extra_modules(
    pipe_or_model: Any, transformer: nn.Module, layout: ParallelismConfig, family: Family
) -> list[tuple[str, nn.Module]]:
    """The modules beside the transformer that are to be sharded, with a name each, before anything is changed."""
    found: list[tuple[str, Model]] = []
    for module in layout.extra_parallel_modules:
        name = module if isinstance(module, str) else type(module).__name__
        if isinstance(module, str):
            module = getattr(pipe_or_model, module, None)
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"extra_parallel_modules names {name!r}, which {type(pipe_or_model).__name__} does not have"
                )
        kind = type(module).__name__
        if module is transformer or any(module is seen for _, seen in found):
            continue
        if hasattr(module, _STATE):
            raise ValueError(f"{name} ({kind}) is parallel already; load it anew to shard it again")
        encoder = None if family.text_encoder is None else family.text_encoder.class_name
        if kind == encoder:
            found.append((name, module))
        elif kind.startswith("Autoencoder"):
            warnings.warn(f"{kind} stays whole on every rank: it is not sharded in this version", stacklevel=3)
        else:
            can = "nothing beside the transformer can" if encoder is None else f"a {encoder} can"
            raise ValueError(
                f"extra_parallel_modules holds a {kind}, which cannot be sharded; with {family.title} {can}"
            )
    return found


__all__ = ["ModelAdapter", "disable_cache", "enable_cache", "summary"]
