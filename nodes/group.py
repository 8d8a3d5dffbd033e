"""A model in a worker group as ComfyUI's objects use it: loaded when first needed, its state on the node that waits."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..parallel_backend.runtime.errors import WorkersFailedError
from ..parallel_backend.runtime.group_config import ModelConfig
from ..parallel_backend.runtime.groups import acquire_model, add_user, find_model, remove_user
from ..parallel_backend.runtime.remote_model import RemoteModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelHandle:
    """Names a model by its configuration. Its group may end and be started again in between.

    As long as a handle exists, the model counts as used.
    """

    config: ModelConfig

    def __post_init__(self) -> None:
        add_user(self.config)
        weakref.finalize(self, remove_user, self.config).atexit = False

    def get(self) -> RemoteModel:
        """The model, ready for requests; loading it shows its state on the node that is being executed.

        Raises:
            ValueError, WorkersFailedError: it cannot be loaded; the text says why.
        """
        return acquire_model(self.config, NodeState(self.config), check_interrupted)

    def offload(self, component: str) -> None:
        """Free the device memory of a component until it is used next; nothing where the model is not loaded."""
        model = find_model(self.config)
        if model is not None:
            try:
                model.offload(component)
            except WorkersFailedError as error:
                # Nothing of it is on a device any more. ComfyUI's own thread asks for this, and must not end by it.
                log.warning("%s", error)


def check_interrupted() -> None:
    """Raise ComfyUI's own exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str) -> None:
    """Show a text on the node that is being executed (ComfyUI's progress text)."""
    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


class NodeState:
    """Shows a model's state on the executing node: as ComfyUI's progress bar and progress text."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        context = get_executing_context()
        self.node_id = context.node_id if context is not None else None
        self.bar: comfy.utils.ProgressBar | None = None

    def __call__(self, state: str, done: float, total: float, detail: str = "") -> None:
        layout = self.config.layout
        degrees = f"ulysses {layout.ulysses_size} x ring {layout.ring_size} x tp {layout.tp_size}"
        where = f"{degrees} on {self.config.devices.kind}"
        if self.config.hosts.several:
            where += f" of {self.config.hosts.count} hosts"
        if state == "starting":
            text = f"starting: {done:.0f} of {total:.0f} processes up" + (f"\n{detail}" if detail else "")
            fraction = 0.5 * done / total
        elif state == "loading":
            text = f"loading: {done / 2**20:.0f} of {total / 2**20:.0f} MiB, {detail}"
            fraction = 0.5 + 0.5 * done / total
        elif state == "ready":
            text, fraction = f"ready: {where}" + (f"\n{detail}" if detail else ""), 1.0
        else:
            text, fraction = f"failed: {where}", 0.0
        log.debug("worker group: %s", text)
        if self.node_id is None:
            return
        show_text(text)
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(100, node_id=self.node_id)
        self.bar.update_absolute(round(100 * fraction), 100)
