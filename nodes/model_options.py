"""What a MODEL's options may hold, and what becomes of each key where the model runs in parallel workers.

``docs/comfyui_nodes.md`` has the same table for users. A key that is not in it is said in the log, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

log = logging.getLogger(__name__)

Path = tuple[str, ...]
"""Where something is in nested options: ``("patches", "attn1_patch")``."""
NodeOf = Callable[[Path], "str | None"]
"""The node that put it there, as users see it; None where it cannot be found out."""

SAMPLING_FUNCTIONS = (
    "model_function_wrapper", "sampler_calc_cond_batch_function", "sampler_cfg_function", "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
)  # fmt: skip
"""Options that are functions; they may evaluate the model once more, with options of their own."""

HONOURED, REFUSED, LOGGED, NOTHING = "honoured", "refused", "logged", "nothing"
"""``NOTHING``: there is nothing to do, because it is written by a model while it runs, or read by other models only."""

TRANSFORMER_OPTIONS: dict[str, str] = {
    **dict.fromkeys(
        # ComfyUI's own side reads these, before and after the diffusion model; the block cache reads the last four.
        ("wrappers", "callbacks", "easycache", "context_window", "cond_or_uncond", "uuids", "sigmas", "sample_sigmas"),
        HONOURED,
    ),
    **dict.fromkeys(("patches", "patches_replace", "rope_options"), REFUSED),
    "optimized_attention_override": LOGGED,
    # Where ComfyUI keeps weights, of which there are none here.
    **dict.fromkeys(("prefetch_dynamic_vbars", "multigpu_thread_device"), NOTHING),
    # A model tells its patches where it is.
    **dict.fromkeys(
        (
            "activations_shape", "block", "block_index", "block_type", "dim_head", "grid_sizes", "img_slice",
            "model_patch_data", "n_heads", "original_shape", "reference_image_num_tokens", "total_blocks",
            "transformer_index", "transformer_options", "x_ref_attn_map",
        ),
        NOTHING,
    ),
    # LTX, Wan Animate and InfiniteTalk, causal Wan, Chroma Radiance, MiniMax H3: other models, which alone read them.
    **dict.fromkeys(
        (
            "a2v_cross_attn", "v2a_cross_attn", "run_ax", "run_vx", "stg_self_attn_blocks", "stg_skip_self_attn",
            "animate2_cache", "audio_embeds", "ar_config", "ar_state", "chroma_radiance_options",
            "minimax_h3_sigma_shift_audio", "minimax_h3_sigma_shift_video",
        ),
        NOTHING,
    ),
}  # fmt: skip

MODEL_OPTIONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "transformer_options", "context_handler", "denoise_mask_function", "disable_cfg1_optimization",
            "model_function_wrapper", "registered_hooks", "sampler_calc_cond_batch_function", "sampler_cfg_function",
            "sampler_post_cfg_function", "sampler_pre_cfg_function", "to_load_options",
        ),
        HONOURED,
    ),
    # A parallel MODEL has no copies on several of ComfyUI's devices; `RemotePatcher.set_additional_models` says so.
    **dict.fromkeys(("multigpu_clones", "multigpu_options", "multigpu_thread_pool", "ignore_multigpu"), LOGGED),
    # Of loaders: they say how ComfyUI is to build a model of its own, and no MODEL carries them.
    **dict.fromkeys(
        (
            "custom_operations", "dtype", "fp8_optimizations", "global_average_pooling", "gpt_oss_config",
            "initial_device", "llama_quantization_metadata", "load_device", "model_config", "model_name", "num_layers",
            "offload_device", "quantization_metadata", "selected_layers", "t5xxl_quantization_metadata", "txt_offset",
            "vocab_size", "weight_dtype",
        ),
        NOTHING,
    ),
}  # fmt: skip

_said: set[tuple[str, ...]] = set()


def say_once(*what: str) -> None:
    """Log what a graph asks for and does not get; the same words once."""
    if what not in _said:
        _said.add(what)
        log.warning(" ".join(what))


def check_transformer_options(options: Mapping[str, Any], node_of: NodeOf, ours: Iterable[str] = ()) -> None:
    """Refuse, or say in the log, what of the options the workers do not do.

    Args:
        options: ``transformer_options`` as a diffusion model gets them.
        node_of: names nodes.
        ours: keys of this pack.

    Raises:
        ValueError: a node changes what the model computes, in blocks that are in the workers.
    """
    for key, value in options.items():
        treatment = TRANSFORMER_OPTIONS.get(key)
        if treatment == REFUSED and value:
            _refuse(key, value, node_of)
        elif key == "optimized_attention_override" and value is not None:
            who = node_of((key,)) or "a node"
            say_once(
                f"{who} chooses an attention kernel ({_name(value)}): parallel workers choose their own, and the "
                "picture differs by rounding only (by more, if that kernel leaves part of the attention out)"
            )
        elif treatment is None and key not in ours and value is not None:
            say_once(f"the model's option {key} (of {node_of((key,)) or 'a node'}) is not read by parallel workers")


def _refuse(key: str, value: Any, node_of: NodeOf) -> None:
    if key == "rope_options":
        raise ValueError(
            f"{node_of((key,)) or 'a node'} changes the model's position encoding (rope_options), which the parallel "
            "workers do not take; bypass it"
        )
    named = [(key, str(name)) for name, patches in value.items() if patches]
    if named:
        who = next((node for node in map(node_of, named) if node), "a node")
        raise ValueError(
            f"{who} patches the model's blocks ({', '.join(name for _, name in named)}), which live in the parallel "
            "workers; bypass it, or use ComfyUI's own loader"
        )


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__).replace(".<locals>", "")


def paths(options: Mapping[Any, Any], depth: int = 3) -> frozenset[Path]:
    """Where something is in nested options and lists, down to a depth, each place with those above it."""

    def walk(tree: Mapping[Any, Any] | list[Any], above: Path) -> Iterable[Path]:
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            here = (*above, str(key))
            yield here
            if isinstance(value, (Mapping, list)) and len(here) < depth:
                yield from walk(value, here)

    return frozenset(walk(options, ()))
