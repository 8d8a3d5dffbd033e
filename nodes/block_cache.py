"""Block Cache: the node between a parallel loader and a sampler that has steps skip most of their blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..parallel_backend.cache.config import PRESETS, CacheSettings
from ..parallel_backend.cache.step_mask import POLICIES, parse_mask
from .cache_run import RUN_KEY, CacheWrappers
from .comfy_model import RemoteDiffusionModel
from .layout import ALIASES, CATEGORY

CUSTOM = "custom"
START = PRESETS["quality"]
"""Where the custom fields start: the first preset."""
MOST_BLOCKS, MOST_STEPS = 1000, 10_000


class BlockCache(io.ComfyNode):
    """Gives a MODEL whose samplers use the workers' block cache; the weights stay where they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_BlockCache",
            display_name="Block Cache",
            category=CATEGORY,
            description=(
                "Skips the middle blocks of steps whose first blocks have hardly changed since the last computed step "
                "(DBCache), and can extrapolate what the skipped ones would add (TaylorSeer). Goes between a parallel "
                "loader and a sampler; bypassed, the picture is the uncached one."
            ),
            search_aliases=["dbcache", "taylorseer", "cache-dit", "first block cache", "teacache", "speed", *ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from a parallel loader."),
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        *(io.DynamicCombo.Option(name, []) for name in PRESETS),
                        io.DynamicCombo.Option(CUSTOM, custom_inputs()),
                    ],
                    tooltip="'quality' stays close to the uncached picture, 'speed' skips more. 'high_noise' and "
                    "'low_noise' are for Wan 2.2's experts, each of which has half of the steps. 'custom' opens all "
                    "settings.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The same MODEL; samplers behind it use the cache.")],
            hidden=[io.Hidden.unique_id],
            # Or nodes with equal inputs would share their output in ComfyUI's cache, but each shows runs of its own.
            not_idempotent=True,
        )

    @classmethod
    def validate_inputs(cls, preset=None, **_):
        # Raised, not returned: what is returned is repeated by ComfyUI for each of the node's inputs.
        make_settings(preset)
        return True

    @classmethod
    def execute(cls, model, preset: dict[str, Any]) -> io.NodeOutput:
        settings = make_settings(preset)
        diffusion_model = getattr(model.model, "diffusion_model", None)
        if not isinstance(diffusion_model, RemoteDiffusionModel):
            raise ValueError(
                "this MODEL does not come from a parallel loader: Block Cache works in the parallel workers; use Load "
                "Pipeline (Parallel), or EasyCache for other models"
            )
        settings.config.check_blocks(diffusion_model.block_count, "this MODEL")
        wrappers = CacheWrappers(settings, diffusion_model.handle, cls.hidden.unique_id)
        model = model.clone()
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
            (WrappersMP.PREDICT_NOISE, wrappers.predict_noise),
        ):
            # Of two Block Caches in a row the last one counts.
            model.remove_wrappers_with_key(kind, RUN_KEY)
            model.add_wrapper_with_key(kind, RUN_KEY, wrapper)
        return io.NodeOutput(model)


def make_settings(values: dict[str, Any] | None) -> CacheSettings:
    """The settings that the node's fields say; fields that are missing, or linked and not known yet, are the defaults.

    Raises:
        ValueError: an unknown preset, or a value out of range.
    """
    preset = (values or {}).get("preset")
    if preset in PRESETS:
        return PRESETS[preset]
    if values is None or preset != CUSTOM:
        raise ValueError(f"preset must be one of {', '.join([*PRESETS, CUSTOM])}")
    given = {name: value for name, value in values.items() if name != "preset" and value is not None}
    order = given.pop("taylorseer_order", START.order)
    given["steps_computation_mask"] = parse_mask(given.get("steps_computation_mask", ""))
    # A limit of 0 would compute each step, and a number field cannot be empty.
    limit = "max_accumulated_residual_diff_threshold"
    given[limit] = given.get(limit) or None
    return CacheSettings.with_order(replace(START.config, **given), order)


def custom_inputs() -> list[io.Input]:
    """A field for each setting, under its name in `DBCacheConfig`."""
    return [
        _number(
            "Fn_compute_blocks",
            1,
            MOST_BLOCKS,
            "First blocks, computed in each step; how much their residual has changed decides. More: better, slower.",
        ),
        _number("Bn_compute_blocks", 0, MOST_BLOCKS, "Last blocks, computed in each step."),
        _share(
            "residual_diff_threshold",
            1,
            "A step is cached where the relative difference of residuals is below this. 0 computes each step, 1 caches "
            "each step that the other rules allow.",
        ),
        _number("max_warmup_steps", 0, MOST_STEPS, "First steps of a run, always computed."),
        _number("warmup_interval", 1, MOST_STEPS, "Within the warmup, every how many steps one is always computed."),
        _number("max_cached_steps", -1, MOST_STEPS, "Most cached steps in a run; -1: no limit."),
        _number("max_continuous_cached_steps", -1, MOST_STEPS, "Most cached steps in a row; -1: no limit."),
        _share(
            "max_accumulated_residual_diff_threshold",
            1000,
            "Once the measured differences of a run add up to this, each step is computed; 0: no limit.",
        ),
        io.Int.Input(
            "taylorseer_order",
            default=START.order,
            min=0,
            max=4,
            optional=True,
            tooltip="Cached steps extrapolate what the skipped blocks would add, with derivatives up to this order "
            "(TaylorSeer). 0: they repeat it. Each order keeps one more copy of a residual.",
        ),
        io.String.Input(
            "steps_computation_mask",
            default="",
            optional=True,
            tooltip=f"Which steps to compute whatever the residuals say: {', '.join(POLICIES)}, or ones (compute) and "
            "zeros such as 1111 0 11 00 1. Empty: no mask.",
        ),
        io.Combo.Input(
            "steps_computation_policy",
            options=["dynamic", "static"],
            default=START.config.steps_computation_policy,
            optional=True,
            tooltip="At a 0 of the mask: 'dynamic' asks the threshold, 'static' caches the step.",
        ),
    ]


def _number(name: str, least: int, most: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=getattr(START.config, name), min=least, max=most, optional=True, tooltip=tooltip)


def _share(name: str, most: float, tooltip: str) -> io.Input:
    default = getattr(START.config, name) or 0.0
    return io.Float.Input(name, default=default, min=0, max=most, step=0.01, optional=True, tooltip=tooltip)
