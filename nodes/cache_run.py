"""One call of a sampler with the block cache: names its evaluations, and shows on the node what comes of them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..parallel_backend.cache.config import CacheSettings
from ..parallel_backend.cache.decision import Evaluation
from ..parallel_backend.cache.run import CacheRun
from ..parallel_backend.runtime.client.groups import find_model
from .group import ModelHandle

log = logging.getLogger(__name__)

RUN_KEY = "hybrid_dit_block_cache"
"""Of the wrappers on a MODEL, and of the run among a sampler's transformer_options."""
EVENT = "hybrid_dit.block_cache"
"""What web/block_cache.js listens to."""
SHOW_SECONDS = 0.2
"""A run in progress is shown no more often than this."""


@dataclass(frozen=True)
class CacheWrappers:
    """What Block Cache hangs onto a MODEL; each call of a sampler becomes a run of its own.

    Args:
        settings: thresholds and calibrator.
        handle: the MODEL's workers.
        node_id: where the runs are shown.
    """

    settings: CacheSettings
    handle: ModelHandle
    node_id: str

    def outer_sample(self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any,
                     **kwargs: Any) -> Any:  # fmt: skip
        """ComfyUI's OUTER_SAMPLE wrapper: around one call of a sampler."""
        # The guider's options are a copy for this call: what is put there ends with it, and no other MODEL sees it.
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        others = other_caches(executor.class_obj.model_options)
        if others:
            log.warning(warning_of(others))
        run = options[RUN_KEY] = SamplerRun(self.settings, sigmas.tolist(), self.handle, self.node_id, others)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(RUN_KEY, None)
            run.end()

    @staticmethod
    def predict_noise(executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's PREDICT_NOISE wrapper: around one evaluation as samplers count them."""
        run = executor.class_obj.model_options["transformer_options"].get(RUN_KEY)
        if run is not None:
            run.begin_evaluation()
        return executor(*args, **kwargs)


class SamplerRun:
    """A run, as the model's stand-in finds it in its transformer_options. (An object: ComfyUI copies dicts and lists.)

    Args:
        settings, handle, node_id: as in `CacheWrappers`.
        sigmas: of this call of the sampler.
        others: other caches on the MODEL, which the node warns of.
    """

    def __init__(
        self, settings: CacheSettings, sigmas: list[float], handle: ModelHandle, node_id: str, others: list[str]
    ) -> None:
        self.cache = CacheRun(settings, sigmas)
        self.handle, self.node_id, self.others = handle, node_id, others
        context = get_executing_context()
        self._prompt_id = None if context is None else context.prompt_id
        self._calls: Counter[str] = Counter()
        self._shown = 0.0

    def begin_evaluation(self) -> None:
        """The sampler asks for another prediction."""
        self._calls.clear()

    def plan(self, handle: ModelHandle, options: dict[str, Any]) -> tuple[CacheRun, Evaluation] | None:
        """What `RemoteModel.predict` takes as ``cache`` for a call of the model; None where the cache keeps out of it.

        A stream is the conditionings that ComfyUI has put into this call: where it batches them differently in the
        middle of a run, those streams begin anew. Conditionings that return within one evaluation, as tiles and context
        windows make them, stand for other parts of the picture each time.
        """
        uuids = options.get("uuids")
        if handle != self.handle or not uuids:
            return None
        stream = "+".join(map(str, uuids))
        self._calls[stream] += 1
        if self._calls[stream] > 1:
            stream += f"#{self._calls[stream]}"
        return self.cache, self.cache.evaluation(stream, self.cache.position(float(options["sigmas"].flatten()[0])))

    def evaluated(self) -> None:
        """Show how far the run is, now and then."""
        if time.monotonic() - self._shown >= SHOW_SECONDS:
            self._show(running=True)

    def end(self) -> None:
        """Free what the workers keep and show the run; never raises, so that an error or Cancel stays what it is."""
        try:
            model = find_model(self.handle.config)
            if model is not None:
                model.end_run(self.cache)
            self._show(running=False)
        except Exception:
            log.exception("the end of a run with Block Cache")

    def _show(self, running: bool) -> None:
        server = PromptServer.instance
        report = self.cache.report()
        if not report["evaluations"] or server.client_id is None:
            return
        text = describe(report) + (f".\n{warning_of(self.others)}" if self.others else "")
        message = {
            "node": self.node_id,
            "prompt_id": self._prompt_id,
            "running": running,
            "steps": report["steps"],
            "threshold": report["settings"]["config"]["residual_diff_threshold"],
            "computed": report["computed"],
            "cached": report["cached"],
            "streams": report["streams"],
            "seconds_saved": report["seconds_saved"],
            "others": self.others,
            "evaluations": [_plain(evaluation) for evaluation in report["evaluations"]],
        }
        server.send_sync(EVENT, message, server.client_id)
        server.send_progress_text(text, self.node_id, server.client_id)
        self._shown = time.monotonic()


def describe(report: dict[str, Any]) -> str:
    """A run's report as it stands on the node."""
    text = f"{report['computed']} computed, {report['cached']} cached, about {report['seconds_saved']:.1f} s saved"
    diffs = [e["diff"] for e in report["evaluations"] if e["diff"] is not None]
    if diffs:
        text += f";\nresidual differences {min(diffs):.3f} to {max(diffs):.3f}"
    return text


def other_caches(model_options: dict[str, Any]) -> list[str]:
    """Names of what else on a MODEL skips computation: EasyCache, LazyCache, and wrappers that are called caches."""
    options = model_options.get("transformer_options", {})
    names = [holder.name] if (holder := options.get("easycache")) is not None else []
    keys = {str(key) for wrappers in options.get("wrappers", {}).values() for key in wrappers}
    function = model_options.get("model_function_wrapper")
    if function is not None:
        keys.add(getattr(function, "__qualname__", type(function).__qualname__))
    known = (RUN_KEY, "easycache", "lazycache")
    return names + sorted(key for key in keys if "cache" in key.lower() and key not in known)


def warning_of(others: list[str]) -> str:
    """What to say where other caches are on the same MODEL."""
    names = ", ".join(others)
    return f"{names} and Block Cache both skip computation on this MODEL, and their errors add up; bypass one of them"


def _plain(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation for the plot."""
    return {name: evaluation[name] for name in ("stream", "position", "computed", "reason", "diff")}
