"""A model in a worker group as ComfyUI's objects use it: loaded when first needed, with Cancel and progress."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..parallel_backend.runtime.client.groups import acquire_model, add_user, find_model, remove_user
from ..parallel_backend.runtime.client.remote_model import RemoteModel
from ..parallel_backend.runtime.errors import RequestFailedError, WorkersFailedError
from ..parallel_backend.runtime.group_config import ModelConfig
from .shared_memory import is_there, lend, take_back
from .states import set_progress

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

    def __deepcopy__(self, memo: object) -> ModelHandle:
        return self  # it names the model; a copy would name the same

    def get(self, component: str = "") -> RemoteModel:
        """The model, ready for requests; how far it is is shown while it is loaded.

        Args:
            component: that is about to be used.

        Raises:
            ValueError, WorkersFailedError: it cannot be loaded; the text says why.
        """
        take_back(self.config, component)
        with Waiting(self.config) as on_state:
            return acquire_model(self.config, on_state, check_interrupted)

    def is_there(self, device: torch.device) -> bool:
        """Whether it is loaded, and ComfyUI has it on a GPU."""
        return is_there(self.config, device)

    def lend(self, device: torch.device, asked: int) -> int:
        """Give ComfyUI memory of a device; see `shared_memory.lend`."""
        return lend(self.config, device, asked)

    def offload(self, component: str) -> None:
        """Free the device memory of a component until it is used next; nothing where the model is not loaded."""
        model = find_model(self.config)
        if model is not None:
            try:
                model.offload(component)
            except (WorkersFailedError, RequestFailedError, ValueError) as error:
                # ComfyUI's own thread asks for this, and must not end by it.
                log.warning("asked for the memory of the %s: %s", component.replace("_", " "), error)


def check_interrupted() -> None:
    """Raise ComfyUI's own exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def show_text(text: str) -> None:
    """Show a text on the node that is being executed (ComfyUI's progress text)."""
    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(text, context.node_id)


class Waiting:
    """Shows how far a model is for which a node waits: on the nodes that loaded it, and as the waiting one's progress.

    A context manager whose value is what `WorkerGroup.start` and `WorkerGroup.load` call ``on_state``. Nothing is shown
    of a model that is there.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.fraction = 0.0
        self.bar: comfy.utils.ProgressBar | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            set_progress(self.config, None)

    def __call__(self, state: str, done: float, total: float, detail: str = "") -> None:
        # What is to be loaded is known when each rank has counted; shares that went back would be no progress.
        share = done / total
        if state == "starting":
            text, share = f"starting: {done:.0f} of {total:.0f} processes up", 0.5 * share
        elif state == "loading":
            self.fraction = max(self.fraction, share)
            text, share = f"loading: {100 * self.fraction:.0f} %", 0.5 + 0.5 * self.fraction
        else:  # what has become of it is seen when the wait ends
            return
        log.debug("worker group: %s, %s", text, detail)
        if self.bar is None:
            context = get_executing_context()
            self.bar = comfy.utils.ProgressBar(100, node_id=None if context is None else context.node_id)
        self.bar.update_absolute(round(100 * share), 100)
        set_progress(self.config, f"{text}\n{detail}" if detail and state == "starting" else text)
