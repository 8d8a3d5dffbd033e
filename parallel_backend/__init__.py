"""Hybrid parallelism for diffusion transformers: Ulysses x Ring x TP, from a script, the command line or ComfyUI."""

from .cache.config import DBCacheConfig, TaylorSeerCalibratorConfig
from .config import ParallelismConfig

__version__ = "0.1.0"

_LAZY = {
    "enable_cache": "parallelize",
    "disable_cache": "parallelize",
    "summary": "parallelize",
    "ModelAdapter": "parallelize",
    "set_lora": "lora",
}


def __getattr__(name: str):
    # torch and diffusers are imported when the library is used, not when a configuration is made.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DBCacheConfig",
    "ModelAdapter",
    "ParallelismConfig",
    "TaylorSeerCalibratorConfig",
    "disable_cache",
    "enable_cache",
    "set_lora",
    "summary",
]
