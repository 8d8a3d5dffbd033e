"""Parallel Layout: the node that says over how many devices, and how, a model is split."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..parallel_backend.config import AS_IT_IS, ParallelismConfig, Speed
from ..parallel_backend.runtime.devices import gpu_numbers
from ..parallel_backend.runtime.group_config import check_devices
from ..parallel_backend.runtime.hosts import ALONE, EXAMPLE, Hosts

CATEGORY = "model/loaders/parallel"
MAX_DEGREE = 64


@dataclass(frozen=True)
class Layout:
    """What travels along the layout socket; with ``auto``, loaders choose the degrees for their model."""

    degrees: ParallelismConfig
    devices: str
    hosts: Hosts = ALONE
    auto: bool = False
    speed: Speed = AS_IT_IS


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
                "How a model is split over devices. The three degrees multiply to the number of devices. "
                "Ulysses and Ring split the image's tokens (faster), TP splits the weights (smaller, and faster)."
            ),
            search_aliases=["ulysses", "ring", "tensor parallel", "context parallel", "multi gpu", "usp"],
            inputs=[
                io.Int.Input(
                    "ulysses",
                    default=2,
                    min=1,
                    max=MAX_DEGREE,
                    tooltip="Ulysses degree: attention heads are exchanged for tokens. The fastest way to split the "
                    "tokens where the GPUs are linked well. Heads must divide by Ulysses x TP.",
                ),
                io.Int.Input(
                    "ring",
                    default=1,
                    min=1,
                    max=MAX_DEGREE,
                    tooltip="Ring degree: keys and values travel around the GPUs. Any degree works, also where heads "
                    "do not divide; best for long sequences and slower links.",
                ),
                io.Int.Input(
                    "tp",
                    default=1,
                    min=1,
                    max=MAX_DEGREE,
                    tooltip="Tensor parallel degree: each GPU holds 1/TP of the weights. Take the smallest with which "
                    "the model fits, and give the other GPUs to Ulysses or Ring.",
                ),
                io.String.Input(
                    "devices",
                    default="auto",
                    tooltip="'auto' takes the first GPUs (or the CPU where there is none), 'cpu' the CPU, "
                    "'0,1,2,3' those GPUs.",
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
                    "auto",
                    default=False,
                    optional=True,
                    tooltip="The loader chooses the degrees: of all layouts of these devices the fastest that fits "
                    "the model into their memory, by the GPUs and the links between them. It shows which, and why. "
                    "The three degrees are then not looked at.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Compile the model's blocks with torch.compile: about 5 % faster steps on two GPUs, more "
                    "on many, for a minute or so before the first one. Other sizes and prompts need no other minute.",
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
                    "kernels: faster with NVLink. Where GPUs cannot, the log says why, and NCCL is used.",
                ),
            ],
            outputs=[LayoutSocket.Output("layout", tooltip="Goes into a parallel loader.")],
        )

    @classmethod
    def validate_inputs(cls, ulysses=None, ring=None, tp=None, devices=None, nnodes=1, rdzv_endpoint="", auto=False):
        # Linked values are not known yet; what is known is checked before the prompt is accepted.
        if None in (ulysses, ring, tp, devices, nnodes, rdzv_endpoint, auto):
            return True
        try:
            make_layout(ulysses, ring, tp, devices, nnodes, rdzv_endpoint, auto)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        ulysses: int,
        ring: int,
        tp: int,
        devices: str,
        nnodes: int = 1,
        rdzv_endpoint: str = "",
        auto: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
        copy_engines: bool = False,
    ) -> io.NodeOutput:
        speed = Speed(compile, cuda_graphs, copy_engines)
        return io.NodeOutput(make_layout(ulysses, ring, tp, devices, nnodes, rdzv_endpoint, auto, speed))


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
            f"'auto' chooses among layouts of one host, but nnodes is {hosts.count}; set 'auto' to false and choose "
            "degrees"
        )
    else:
        gpu_numbers(devices)
    return Layout(degrees, devices, hosts, auto, speed)
