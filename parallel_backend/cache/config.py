"""What a user chooses about the cache: thresholds, calibrator, step mask, and the presets. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from ..config import is_int
from .step_mask import POLICIES, parse_mask, steps_mask

Number = TypeVar("Number", int, float)

_LEAST = {
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "warmup_interval": 1,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": -1,
}


@dataclass(frozen=True)
class DBCacheConfig:
    """Thresholds of DBCache, the dual block cache of cache-dit, with its names and defaults.

    A step runs the first blocks and measures how much their residual has changed since the last step that was computed
    in full. Where it has changed little, the blocks in the middle are skipped and what they added then is added again.

    Args:
        Fn_compute_blocks: first blocks that are computed in each step and whose residual is measured.
        Bn_compute_blocks: last blocks that are computed in each step.
        residual_diff_threshold: relative L1 difference of residuals below which a step is taken from the cache;
            0 computes each step, 1 takes each step that the other rules allow.
        max_warmup_steps: first steps that are always computed.
        warmup_interval: within the warmup, every how many steps one is always computed.
        max_cached_steps: most cached steps in a run; -1 means no limit.
        max_continuous_cached_steps: most cached steps in a row; -1 means no limit.
        max_accumulated_residual_diff_threshold: sum of the differences measured in a run from which on each step is
            computed; None means no limit.
        steps_computation_mask: 1 for a step to compute and 0 for a step that may be cached, or the name of a mask that
            fits any number of steps: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``; None for no mask.
        steps_computation_policy: whether a 0 in the mask asks the threshold (``"dynamic"``) or not (``"static"``).
        num_inference_steps: steps of a run, which a mask by name needs where they cannot be told otherwise.

    Raises:
        ValueError: a value out of range, by name.
    """

    Fn_compute_blocks: int = 8
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.08
    max_warmup_steps: int = 8
    warmup_interval: int = 1
    max_cached_steps: int = -1
    max_continuous_cached_steps: int = -1
    max_accumulated_residual_diff_threshold: float | None = None
    steps_computation_mask: str | tuple[int, ...] | None = None
    steps_computation_policy: str = "dynamic"
    num_inference_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _check_int(f"DBCacheConfig.{name}", getattr(self, name), least)
        _check_number("DBCacheConfig.residual_diff_threshold", self.residual_diff_threshold, 0, 1)
        if self.max_accumulated_residual_diff_threshold == math.inf:
            object.__setattr__(self, "max_accumulated_residual_diff_threshold", None)  # JSON has no infinity
        if self.max_accumulated_residual_diff_threshold is not None:
            name = "max_accumulated_residual_diff_threshold"
            _check_number(f"DBCacheConfig.{name}", self.max_accumulated_residual_diff_threshold, 0, None)
        if self.num_inference_steps is not None:
            _check_int("DBCacheConfig.num_inference_steps", self.num_inference_steps, 1)
        if self.steps_computation_policy not in ("dynamic", "static"):
            raise ValueError(
                "DBCacheConfig.steps_computation_policy must be 'dynamic' or 'static'; "
                f"got {self.steps_computation_policy!r}"
            )
        mask = self.steps_computation_mask
        if isinstance(mask, Sequence) and not isinstance(mask, str):
            object.__setattr__(self, "steps_computation_mask", _checked_mask(mask))
        elif mask is not None and mask not in POLICIES:
            raise ValueError(
                f"DBCacheConfig.steps_computation_mask must be one of {', '.join(POLICIES)} or ones and zeros; "
                f"got {mask!r}"
            )

    def mask(self, steps: int | None) -> tuple[int, ...] | None:
        """The mask of a run of ``steps`` steps, None without one.

        Raises:
            ValueError: a named mask and no number of steps.
        """
        mask = self.steps_computation_mask
        if not isinstance(mask, str):
            return mask
        steps = steps or self.num_inference_steps
        if steps is None:
            raise ValueError(
                f"steps_computation_mask={mask!r} needs the number of steps: set DBCacheConfig.num_inference_steps"
            )
        return steps_mask(mask, steps)

    def check_blocks(self, blocks: int, model: str) -> None:
        """Raise ValueError unless a model of so many blocks has any left to skip."""
        if self.Fn_compute_blocks + self.Bn_compute_blocks >= blocks:
            raise ValueError(
                f"Fn_compute_blocks={self.Fn_compute_blocks} and Bn_compute_blocks={self.Bn_compute_blocks} leave "
                f"nothing to skip: {model} has {blocks} blocks; their sum must be at most {blocks - 1}"
            )


@dataclass(frozen=True)
class TaylorSeerCalibratorConfig:
    """TaylorSeer (arXiv:2503.06923): cached steps extrapolate what the middle blocks add, instead of repeating it.

    Args:
        taylorseer_order: highest derivative in use, 1 to 4. Each keeps one more copy of the middle blocks' residual.

    Raises:
        ValueError: an order out of range.
    """

    taylorseer_order: int = 1

    def __post_init__(self) -> None:
        order = self.taylorseer_order
        if not is_int(order) or not 1 <= order <= 4:
            raise ValueError(f"TaylorSeerCalibratorConfig.taylorseer_order must be 1, 2, 3 or 4; got {order!r}")


@dataclass(frozen=True)
class CacheSettings:
    """A cache's configuration and its calibrator, as they travel together."""

    config: DBCacheConfig
    calibrator: TaylorSeerCalibratorConfig | None = None

    @classmethod
    def with_order(cls, config: DBCacheConfig, order: int) -> CacheSettings:
        """The settings of a TaylorSeer order; 0 is none."""
        return cls(config, TaylorSeerCalibratorConfig(order) if order else None)

    @property
    def order(self) -> int:
        """TaylorSeer's order; 0 without it."""
        return 0 if self.calibrator is None else self.calibrator.taylorseer_order

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for messages and reports."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CacheSettings:
        """The way back."""
        calibrator = values["calibrator"]
        return cls(
            DBCacheConfig(**values["config"]),
            None if calibrator is None else TaylorSeerCalibratorConfig(**calibrator),
        )


def _check_int(name: str, value: object, least: int) -> None:
    if not is_int(value) or value < least:  # type: ignore[operator]
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")


def _check_number(name: str, value: object, least: float, most: float | None) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value or (most is not None and not value <= most):  # type: ignore[operator]
        limits = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {limits}; got {value!r}")


def _checked_mask(mask: Sequence[Any]) -> tuple[int, ...]:
    wrong = [value for value in mask if value not in (0, 1)]
    if wrong or not mask:
        raise ValueError(
            f"DBCacheConfig.steps_computation_mask must hold ones and zeros, one for each step; got {list(mask)!r}"
        )
    return tuple(int(value) for value in mask)


PRESETS = {
    name: CacheSettings(config, TaylorSeerCalibratorConfig(1))
    for name, config in {
        "quality": DBCacheConfig(Fn_compute_blocks=1),
        "speed": DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.2),
        "high_noise": DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, max_cached_steps=8),
        "low_noise": DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, max_cached_steps=20),
    }.items()
}
"""Points of the frontier that docs/cache.md shows, quality first or speed first; and cache-dit's for Wan 2.2's two
experts, each of which has a run of its own of half of the steps."""


def parse_cache(text: str) -> CacheSettings:
    """A cache as the command line spells it: a preset's name, or settings as ``name=value`` with commas between.

    Names are those of `DBCacheConfig`, and ``taylorseer_order``; a mask is a policy's name or ones and zeros.

    Raises:
        ValueError: an unknown name or a value out of range.
    """
    if text in PRESETS:
        return PRESETS[text]
    names = [field.name for field in fields(DBCacheConfig)]
    values: dict[str, Any] = {}
    calibrator = None
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name == "taylorseer_order":
            calibrator = TaylorSeerCalibratorConfig(_number(name, value, int)) if value != "0" else None
        elif name not in names or not value:
            raise ValueError(
                f"--cache {text!r}: {item!r} is neither a preset ({', '.join(PRESETS)}) nor name=value with one of "
                f"the names {', '.join([*names, 'taylorseer_order'])}"
            )
        elif name == "steps_computation_mask":
            values[name] = parse_mask(value)
        elif name == "steps_computation_policy":
            values[name] = value
        else:
            values[name] = _number(name, value, float if "threshold" in name else int)
    return CacheSettings(DBCacheConfig(**values), calibrator)


def _number(name: str, text: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--cache: {name} must be a {'whole ' if kind is int else ''}number; got {text!r}") from None
