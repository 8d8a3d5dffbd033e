"""Parallel Layout: the node that says over how many devices, and how, a model is split."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..parallel_backend.config import AS_IT_IS, ParallelismConfig, Speed
from ..parallel_backend.planning.devices import gpu_numbers
from ..parallel_backend.runtime.client.groups import find_model
from ..parallel_backend.runtime.group_config import ModelConfig, check_devices
from ..parallel_backend.runtime.host_address import ALONE, EXAMPLE, Hosts
from .states import HIDDEN, Place, is_running, no_text, refresh, show

if TYPE_CHECKING:
    from ..parallel_backend.loading.checkpoint import Checkpoint
    from ..parallel_backend.planning.auto_layout import Choice

log = logging.getLogger(__name__)

CATEGORY = "model/loaders/parallel"
ALIASES = ["hybrid dit", "distributed", "sequence parallel"]
"""What all nodes are found by."""
MAX_DEGREE = 64


@dataclass(frozen=True)
class Layout:
    """What travels along the layout socket; with ``auto``, loaders choose the degrees for their model.

    ``node`` is the id of the node that it comes from, and shows what was chosen.
    """

    degrees: ParallelismConfig
    devices: str
    hosts: Hosts = ALONE
    auto: bool = False
    speed: Speed = AS_IT_IS
    node: str = ""


LayoutSocket = io.Custom("HYBRID_DIT_LAYOUT")


class ParallelLayout(io.ComfyNode):
    """Degrees of Ulysses, Ring and TP, and the devices; nothing is started here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HybridDiT_ParallelLayout",
            display_name="Parallel Layout",
            category=CATEGORY,
            description=(
                "How a model is split over devices: the fastest way, or by degrees whose product is their number. "
                "Ulysses and Ring split the image's tokens (faster), TP splits the weights (smaller, and faster)."
            ),
            search_aliases=["ulysses", "ring", "tensor parallel", "context parallel", "multi gpu", "usp", *ALIASES],
            inputs=[
                # All are optional so that this one stands first, and graphs from before it was there still run.
                io.Boolean.Input(
                    "auto",
                    display_name="layout",
                    default=True,
                    label_on="automatic",
                    label_off="set below",
                    optional=True,
                    tooltip="Automatic: the loader splits its model in the fastest way that fits, over all the devices "
                    "named below; this node shows which. Set below: by ulysses, ring and tp.",
                ),
                io.Int.Input(
                    "ulysses",
                    default=1,
                    min=1,
                    max=MAX_DEGREE,
                    optional=True,
                    tooltip="Ulysses degree: attention heads are exchanged for tokens. The fastest way to split the "
                    "tokens where the GPUs are linked well. Heads must divide by Ulysses x TP. Not looked at where "
                    "the layout is automatic.",
                ),
                io.Int.Input(
                    "ring",
                    default=1,
                    min=1,
                    max=MAX_DEGREE,
                    optional=True,
                    tooltip="Ring degree: keys and values travel around the GPUs. Any degree works, also where heads "
                    "do not divide; best for long sequences and slower links. Not looked at where the layout is "
                    "automatic.",
                ),
                io.Int.Input(
                    "tp",
                    default=1,
                    min=1,
                    max=MAX_DEGREE,
                    optional=True,
                    tooltip="Tensor parallel degree: each GPU holds 1/TP of the weights. Take the smallest with which "
                    "the model fits, and give the other GPUs to Ulysses or Ring. Not looked at where the layout is "
                    "automatic.",
                ),
                io.String.Input(
                    "devices",
                    default="auto",
                    optional=True,
                    tooltip="Which devices there are to split over. 'auto': the GPUs of this machine (or the CPU where "
                    "there is none); 'cpu': the CPU; '0,1,2,3': those GPUs. How they are used is the layout's matter.",
                ),
                io.Int.Input(
                    "nnodes",
                    default=1,
                    min=1,
                    max=MAX_DEGREE,
                    optional=True,
                    advanced=True,
                    tooltip="Number of hosts that share the ranks out evenly; the command 'python -m parallel_backend "
                    "worker' runs on each of the others.",
                ),
                io.String.Input(
                    "rdzv_endpoint",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="For several hosts: address and port of this one, as the others reach it, such as "
                    f"{EXAMPLE}. Empty for one host.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Compile the model's blocks with torch.compile. Measured on two H200: 16 s once, before "
                    "the first picture, and steps 6 % faster; more on many GPUs. Other sizes and prompts need no other "
                    "time.",
                ),
                io.Boolean.Input(
                    "cuda_graphs",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Run all blocks of a step as one CUDA graph: faster where the host cannot keep up, as with "
                    "small models on many GPUs. Keeps the memory of a step. Steps with a block cache run without it.",
                ),
                io.Boolean.Input(
                    "copy_engines",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="GPUs that reach each other's memory exchange by their copy engines instead of NCCL's "
                    "kernels: faster with NVLink. Where GPUs cannot, the log says why, and NCCL is used. An automatic "
                    "layout does so by itself where the GPUs can.",
                ),
            ],
            hidden=HIDDEN,
            outputs=[LayoutSocket.Output("layout", tooltip="Goes into a parallel loader.")],
        )

    @classmethod
    def validate_inputs(cls, devices=None):
        # One argument: ComfyUI repeats what is wrong for each. What takes more of them to see is said by `execute`,
        # and the range of a degree by ComfyUI itself.
        try:
            if devices is not None:  # else it is linked, and not known yet
                gpu_numbers(devices)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        auto: bool = False,  # as it was before it could be left out
        ulysses: int = 1,
        ring: int = 1,
        tp: int = 1,
        devices: str = "auto",
        nnodes: int = 1,
        rdzv_endpoint: str = "",
        compile: bool = False,
        cuda_graphs: bool = False,
        copy_engines: bool = False,
    ) -> io.NodeOutput:
        speed = Speed(compile, cuda_graphs, copy_engines)
        place = Place.of(cls.hidden)
        show(place, no_text)  # until a loader has chosen
        layout = make_layout(ulysses, ring, tp, devices, nnodes, rdzv_endpoint, auto, speed)
        return io.NodeOutput(replace(layout, node=place.node))


def make_layout(
    ulysses: int,
    ring: int,
    tp: int,
    devices: str,
    nnodes: int,
    rdzv_endpoint: str,
    auto: bool,
    speed: Speed = AS_IT_IS,
) -> Layout:
    """A layout of the node's inputs.

    Raises:
        ValueError: they cannot work, with the remedy.
    """
    degrees = ParallelismConfig(ulysses_size=ulysses, ring_size=ring, tp_size=tp)
    hosts = Hosts(nnodes, rdzv_endpoint)
    if not auto:
        check_devices(devices, degrees, hosts)
    elif hosts.several:
        raise ValueError(
            f"an automatic layout is one of this host alone, but nnodes is {hosts.count}; set 'layout' to 'set "
            "below' and choose degrees"
        )
    else:
        gpu_numbers(devices)
    return Layout(degrees, devices, hosts, auto, speed)


class LayoutWarning:
    """What a layout that was set by hand shows: whether fewer GPUs would be faster, once that is worked out.

    That is done beside whatever goes on, since it takes a second.

    Args:
        source: what is loaded.
        layout: of the node.
        dtype, fp8: see `ModelConfig.create`.
    """

    def __init__(self, source: Checkpoint, layout: Layout, dtype: str, fp8: str) -> None:
        self.text = ""
        if layout.degrees.world_size > 1 and not layout.hosts.several:
            threading.Thread(target=self._find, args=(source, layout, dtype, fp8), daemon=True).start()

    def __call__(self) -> str:
        return self.text

    def _find(self, source: Checkpoint, layout: Layout, dtype: str, fp8: str) -> None:
        from ..parallel_backend.planning.auto_layout import warning_of

        try:
            self.text = warning_of(source, layout.devices, layout.degrees, dtype, fp8)
        except ValueError as error:  # there is no such layout, which loading says, or nothing is known of the GPUs
            log.debug("no prediction: %s", error)
        if self.text:
            log.warning("Parallel Layout: %s", self.text)
            refresh()


class ChoiceText:
    """What an automatic layout shows: what was chosen, and from the first picture on what would be faster still."""

    def __init__(self, choice: Choice, config: ModelConfig) -> None:
        self.choice, self.config = choice, config
        self.drawn = False

    def __call__(self) -> str:
        choice = self.choice
        text = f"Chosen {choice.reason}{'; exchanges by copy engines' if choice.copies else ''}"
        if choice.options and not self.config.speed.compile:
            model = find_model(self.config)
            self.drawn |= model is not None and len(model.seconds["steps"]) > 0 and not is_running()
            if self.drawn:
                text += "\nNot compiled. On two H200, 'compile' took 16 s once and then 6 % less a step."
        return text
