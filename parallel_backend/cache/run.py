"""One run of a sampler with a cache: what was decided for each evaluation, and what that saved."""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .config import CacheSettings
from .decision import Decision, Evaluation


class CacheRun:
    """Names the evaluations of a run and collects the decisions.

    Args:
        settings: thresholds and calibrator.
        sigmas: the run's noise levels, the last one included; None where they are not known. They fall, or rise where
            a picture is turned back into noise.
        steps: of the run, where `sigmas` are not known.
    """

    def __init__(
        self, settings: CacheSettings, sigmas: Sequence[float] | None = None, steps: int | None = None
    ) -> None:
        self.id = uuid.uuid4().hex
        self.settings = settings
        self.sigmas = None if sigmas is None else np.asarray(sigmas, dtype=np.float64)
        self._rising = np.argsort(() if self.sigmas is None else self.sigmas, kind="stable")
        self.steps = steps if self.sigmas is None else len(self.sigmas) - 1
        self._entries: list[tuple[Evaluation, Decision, Callable[[], float]]] = []

    def evaluation(self, stream: str, position: float) -> Evaluation:
        """The evaluation of a stream at a position (in steps)."""
        return Evaluation(self.id, stream, position, self.steps)

    def position(self, sigma: float) -> float:
        """Where in the run a noise level stands, in steps; between two levels of the schedule it is a fraction."""
        assert self.sigmas is not None
        # np.interp wants rising abscissae. Rounded, so that a level of the schedule is a whole number again.
        return round(float(np.interp(sigma, self.sigmas[self._rising], self._rising)), 3)

    def note(self, evaluation: Evaluation, decision: Decision, seconds: float | Callable[[], float]) -> None:
        """Remember a decision that was carried out, and what the evaluation took (now or when asked)."""
        self._entries.append((evaluation, decision, seconds if callable(seconds) else lambda: seconds))

    def report(self) -> dict[str, Any]:
        """The run in figures, under the names that docs/report.md explains."""
        streams = {name: index for index, name in enumerate(dict.fromkeys(e.stream for e, _, _ in self._entries))}
        evaluations = [
            {"stream": streams[e.stream], "position": e.position, **asdict(d), "seconds": seconds()}
            for e, d, seconds in self._entries
        ]
        computed = [e["seconds"] for e in evaluations if e["computed"]]
        cached = [e["seconds"] for e in evaluations if not e["computed"]]
        saved = statistics.median(computed) * len(cached) - sum(cached) if computed else 0.0
        return {
            "settings": self.settings.to_dict(),
            "steps": self.steps,
            "streams": len(streams),
            "computed": len(computed),
            "cached": len(cached),
            "seconds_saved": max(0.0, saved),
            "evaluations": evaluations,
        }


def summarize(report: dict[str, Any]) -> str:
    """A run's report in a line or two."""
    total = report["computed"] + report["cached"]
    lines = [f"{report['cached']} of {total} evaluations from the cache, about {report['seconds_saved']:.1f} s saved"]
    diffs = [e["diff"] for e in report["evaluations"] if e["diff"] is not None]
    if diffs:
        threshold = report["settings"]["config"]["residual_diff_threshold"]
        lines.append(f"residual differences {min(diffs):.3f} to {max(diffs):.3f}, threshold {threshold:g}")
    return "\n".join(lines)
