"""Whether a step is computed or cached: the rules of DBCache as a small state machine. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import DBCacheConfig
from .step_mask import leading_ones


@dataclass(frozen=True)
class Evaluation:
    """Which evaluation of the transformer this is.

    Args:
        run: names one run of a sampler; state never outlives it.
        stream: names a conditioning within the run (such as the positive and the negative prompt), whose residuals are
            compared with each other only.
        position: how far the run is, in steps. Whole numbers for samplers that evaluate once a step; samplers that
            evaluate between or twice have fractions or repeat a position.
        steps: of the run; None if unknown.

    Raises:
        ValueError: a position that is no finite number.
    """

    run: str
    stream: str
    position: float
    steps: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.position):
            raise ValueError(f"an evaluation is at step {self.position} of a run; its sigma or timestep is no number")


NO_NUMBER = "not a number"
"""Reason of a step whose difference, or the one that it was measured from, was NaN or infinite."""

NO_ROOM = "no room"
"""Reason of a step that is computed since there is no memory to keep anything of its stream."""


@dataclass(frozen=True)
class Decision:
    """What was decided for one evaluation. ``diff`` is None where no residuals had to be compared, or had no number."""

    computed: bool
    diff: float | None
    reason: str


class StreamRules:
    """The rules' memory of one conditioning stream in one run.

    Args:
        config: thresholds.
        steps: of the run; None if unknown.

    Raises:
        ValueError: a mask by name where the number of steps is unknown.
    """

    def __init__(self, config: DBCacheConfig, steps: int | None) -> None:
        self.config, self.mask = config, config.mask(steps)
        self.warmup = config.max_warmup_steps
        if self.mask is not None:
            self.warmup = min(self.warmup, leading_ones(self.mask))
        self.cached = 0
        self.continuous = 0
        self.accumulated = 0.0

    def before_measuring(self, position: float, has_content: bool) -> Decision | None:
        """What can be decided at a position (in steps) without residuals; None where they have to be compared."""
        config, mask, step = self.config, self.mask, int(position + 1e-6)
        cap = config.max_accumulated_residual_diff_threshold
        if not has_content:
            return Decision(True, None, "nothing cached yet")
        if step < self.warmup and step % config.warmup_interval == 0:
            return Decision(True, None, "warmup")
        if mask is not None:
            if step < len(mask) and mask[step]:
                return Decision(True, None, "mask")
            if config.steps_computation_policy == "static" and step < len(mask):
                return Decision(False, None, "mask")
        if 0 <= config.max_cached_steps <= self.cached:
            return Decision(True, None, "max_cached_steps")
        if 0 <= config.max_continuous_cached_steps <= self.continuous:
            return Decision(True, None, "max_continuous_cached_steps")
        if cap is not None and self.accumulated >= cap:
            return Decision(True, None, "max_accumulated_residual_diff_threshold")
        if config.residual_diff_threshold <= 0:
            return Decision(True, None, "threshold 0")
        return None

    def after_measuring(self, diff: float) -> Decision:
        """Compare a measured difference with the threshold. One that is no finite number says that all has changed."""
        if not math.isfinite(diff):
            return Decision(True, None, NO_NUMBER)
        self.accumulated += diff
        threshold = self.config.residual_diff_threshold
        # At 1 every step passes, as in cache-dit, even one whose residual has changed by more than itself.
        return Decision(not (diff < threshold or threshold >= 1), diff, "threshold")

    def note(self, decision: Decision) -> None:
        """Count a decision that is carried out."""
        self.cached += not decision.computed
        self.continuous = 0 if decision.computed else self.continuous + 1
