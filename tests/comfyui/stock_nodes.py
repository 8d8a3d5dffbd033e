"""Any of ComfyUI's nodes in a small graph behind a loader, its inputs chosen by their types and its output drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .graphs import Graph, NodeId, Source, add_layout, add_prompt, add_sampler, save_latent, saved_latent
from .server import ComfyServer, PromptRejected, RunResult

SIZE = 64
"""Pixels of a side."""
LORA, HYPERNETWORK = "stock-nodes.safetensors", "stock-nodes.pt"
PATCHED = {
    "diffusion_model.double_blocks.0.img_attn.proj": 128,
    "diffusion_model.transformer_blocks.0.attn.to_q": 256,
    "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj": 256,
}
"""Linears that the LoRA changes, of either model and of the text encoder, and their width."""
SMALL = {"width": SIZE, "height": SIZE, "length": 5, "video_frames": 5, "frames_number": 5, "steps": 2, "batch_size": 1,
         "seed": 1, "noise_seed": 1, "max_length": 4, "octree_level": 2, "lora_name": LORA,
         "hypernetwork_name": HYPERNETWORK, "max_duration": 1.0, "duration": 1.0}  # fmt: skip
"""Of inputs whose default takes long, or is nowhere."""
LISTED: Mapping[str, Mapping[str, Source]] = {
    # Nodes whose default changes nothing, or cannot be.
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SkipLayerGuidanceDiT": {"start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceSD3": {"start_percent": 0.0, "end_percent": 1.0},
    "CLIPSetLastLayer": {"stop_at_clip_layer": -2},
    "SelectModelDevice": {"device": "cpu"},
    "SelectCLIPDevice": {"device": "cpu"},
}
"""Inputs of some nodes."""


@dataclass
class Outcome:
    """What came of a graph.

    Args:
        tensors: what was drawn and encoded, each in the order of its output.
        error: ComfyUI's ``execution_error``, or None.
        rejected: what ComfyUI refused the graph for before it ran.
    """

    tensors: list[Tensor] = field(default_factory=list)
    error: dict[str, Any] | None = None
    rejected: str = ""

    @property
    def failed(self) -> bool:
        return self.error is not None or bool(self.rejected)

    def __str__(self) -> str:
        if self.error is None:
            return self.rejected or f"drew {[tuple(tensor.shape) for tensor in self.tensors]}"
        return f"{self.error['node_type']}: {self.error['exception_type']}: {self.error['exception_message'].strip()}"


def takers(info: Mapping[str, Any], kind: str) -> Iterator[str]:
    """The nodes of ComfyUI itself with an input of a type."""
    for name, node in sorted(info.items()):
        if not node["python_module"].startswith("custom_nodes"):
            inputs = [entry[0] for part in ("required", "optional") for entry in node["input"].get(part, {}).values()]
            if any(isinstance(entry, str) and kind in entry.split(",") for entry in inputs):
                yield name


class NodeGraph:
    """A graph of one node behind a loader.

    Args:
        info: ``/object_info``.
        pipeline: of the loader.
        ours: this pack's loader, of one rank; else the reference pack's.
    """

    def __init__(self, info: Mapping[str, Any], pipeline: str, ours: bool) -> None:
        self.info, self.graph = info, Graph()
        more = {"layout": add_layout(self.graph, ulysses=1, tp=1), "dtype": "auto"} if ours else {}
        kind = "HybridDiT_LoadPipeline" if ours else "ReferencePipelineLoader"
        self.loader = self.graph.add(kind, pipeline=pipeline, **more)
        self.empty = "EmptyFlux2LatentImage" if pipeline == "tiny" else "EmptySD3LatentImage"
        self.made: dict[str, Source] = {}
        self.saves: list[NodeId] = []

    def latent(self) -> NodeId:
        return self.graph.add(self.empty, width=SIZE, height=SIZE, batch_size=1)

    def add(self, kind: str) -> NodeId:
        """The node, with something in each input that it needs, and in those others of which there is something."""
        listed = {**SMALL, **LISTED.get(kind, {})}
        given: dict[str, Source] = {}
        # What is decoded has to be a latent of the sampler's, which has the dimensions that the VAE takes.
        decodes = any(entry[0] == "VAE" for entry in self.info[kind]["input"].get("required", {}).values())

        def fill(inputs: Mapping[str, Any], above: str = "") -> None:
            for part in ("required", "optional"):
                for name, entry in inputs.get(part, {}).items():
                    of_type, options = entry[0], entry[1] if len(entry) > 1 else {}
                    if of_type == "COMFY_AUTOGROW_V3":
                        continue
                    if of_type == "VAE" and part == "optional" and kind.startswith("TextEncode"):
                        continue  # it would encode a reference of a megapixel
                    if of_type == "COMFY_DYNAMICCOMBO_V3":
                        chosen = options["options"][0]
                        given[above + name] = chosen["key"]
                        fill(chosen["inputs"], f"{above}{name}.")
                        continue
                    value = self._value(of_type, options, listed.get(name), part == "required")
                    if of_type == "LATENT" and decodes:
                        value = self._sampled()
                    if name == "empty_conditioning":  # what it is compared with is not itself
                        value = add_prompt(self.graph, self.loader, "nothing")
                    if value is not None:
                        given[above + name] = value

        fill(self.info[kind]["input"])
        return self.graph.add(kind, **given)

    def _value(self, of_type: Any, options: Mapping[str, Any], listed: Source, needed: bool) -> Source | None:
        if of_type == "COMBO" or isinstance(of_type, list):
            choices = of_type if isinstance(of_type, list) else options.get("options") or []
            return listed if listed is not None else options.get("default", choices[0] if choices else "none")
        if of_type in ("INT", "FLOAT", "STRING", "BOOLEAN", "FLOAT,INT"):
            empty: Mapping[str, Any] = {"STRING": "a cat", "BOOLEAN": False}
            value = options.get("default", options.get("min", empty.get(of_type, 1)))
            if listed is not None and not isinstance(listed, str) and of_type != "STRING":
                value = max(listed, options.get("min", listed))
            return "a cat" if value == "" and options.get("multiline") else value
        if of_type not in self.made:
            make = self._makers().get(of_type)
            if make is None and not needed:
                return None
            self.made[of_type] = make() if make else self.graph.add("ReferenceStandIn")
        return self.made[of_type]

    def _makers(self) -> dict[str, Callable[[], Source]]:
        add, loader = self.graph.add, self.loader
        return {
            "MODEL": lambda: (loader, 0),
            "CLIP": lambda: (loader, 1),
            "VAE": lambda: (loader, 2),
            "CONDITIONING": lambda: add_prompt(self.graph, loader),
            "LATENT": self.latent,
            "IMAGE": lambda: add("EmptyImage", width=SIZE, height=SIZE, batch_size=1, color=0x804020),
            # Not the same everywhere, or a picture behind it would be of one colour.
            "MASK": lambda: add("FeatherMask", mask=self._plain_mask(), left=SIZE // 2, top=8, right=0, bottom=0),
            "SIGMAS": lambda: add("Flux2Scheduler", steps=2, width=SIZE, height=SIZE),
            "SAMPLER": lambda: add("KSamplerSelect", sampler_name="euler"),
            "NOISE": lambda: add("RandomNoise", noise_seed=1),
            "GUIDER": lambda: add("BasicGuider", model=(loader, 0), conditioning=add_prompt(self.graph, loader)),
            "LATENT_OPERATION": lambda: add("LatentOperationTonemapReinhard", multiplier=0.5),
            "AUDIO": lambda: add("EmptyAudio", duration=1.0, sample_rate=44100, channels=2),
            "LORA_MODEL": lambda: add("ReferenceLoraModel", name=LORA),
            "HOOKS": lambda: add("CreateHookLora", lora_name=LORA, strength_model=1.0, strength_clip=1.0),
        }  # fmt: skip

    def _plain_mask(self) -> NodeId:
        return self.graph.add("SolidMask", value=1.0, width=SIZE, height=SIZE)

    def draw(self, node: NodeId, kind: str) -> None:
        """Have the node's outputs do what they are for."""
        outputs = self.info[kind]["output"]
        add, loader, get = self.graph.add, self.loader, self._value
        uses: dict[str, Callable[[Source], Source]] = {
            "MODEL": lambda out: self._sampled(model=out),
            "CLIP": lambda out: self._sampled(positive=add("CLIPTextEncode", text="a cat", clip=out)),
            "VAE": lambda out: add("VAEEncode", pixels=get("IMAGE", {}, None, True), vae=out),
            "CONDITIONING": lambda out: self._sampled(positive=out),
            "LATENT": lambda out: out,
            "IMAGE": lambda out: add("VAEEncode", pixels=out, vae=(loader, 2)),
            "SIGMAS": lambda out: self._custom(sigmas=out),
            "SAMPLER": lambda out: self._custom(sampler=out),
            "GUIDER": lambda out: add(
                "SamplerCustomAdvanced", guider=out, latent_image=self.latent(),
                **{name.lower(): get(name, {}, None, True) for name in ("NOISE", "SAMPLER", "SIGMAS")},
            ),
        }  # fmt: skip
        wanted = [output for output in dict.fromkeys(outputs) if output in uses]
        for output in wanted:
            self.saves.append(save_latent(self.graph, uses[output]((node, outputs.index(output)))))
        if not wanted and not self.info[kind]["output_node"]:
            self.graph.add("PreviewAny", source=(node, 0))

    def _sampled(self, **changes: Source) -> NodeId:
        # With a negative prompt, as many nodes change how the two are joined.
        negative = add_prompt(self.graph, self.loader, "blurry")
        return add_sampler(
            self.graph, self.loader, cfg=3.0, negative=negative, latent_image=self.latent(), **changes
        )  # fmt: skip

    def _custom(self, **changes: Source) -> tuple[NodeId, int]:
        prompt = add_prompt(self.graph, self.loader)
        given = {name.lower(): self._value(name, {}, None, True) for name in ("SAMPLER", "SIGMAS")} | changes
        return self.graph.add(
            "SamplerCustom", model=(self.loader, 0), add_noise=True, noise_seed=1, cfg=1.0, positive=prompt,
            negative=prompt, latent_image=self.latent(), **given,
        ), 0  # fmt: skip

    def run(self, server: ComfyServer, timeout: float = 120.0) -> Outcome:
        try:
            result: RunResult = server.run(self.graph, timeout=timeout)
        except PromptRejected as error:
            return Outcome(rejected=str(error))
        if result.error is not None:
            return Outcome(error=result.error)
        return Outcome([saved_latent(server, result, save) for save in self.saves])


def outcome(server: ComfyServer, info: Mapping[str, Any], kind: str, pipeline: str, ours: bool) -> tuple[Outcome, str]:
    """What comes of a node behind a loader, and the id of the node."""
    graph = NodeGraph(info, pipeline, ours)
    node = graph.add(kind)
    graph.draw(node, kind)
    return graph.run(server), str(node)


def write_files(server: ComfyServer) -> None:
    """The files that nodes among these load."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    folders = [server.models / name for name in ("loras", "hypernetworks")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    lora = {}
    for base, width in PATCHED.items():
        lora[f"{base}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        lora[f"{base}.lora_B.weight"] = torch.randn(width, 4, generator=generator) / 16
    save_file(lora, folders[0] / LORA)
    layer = {"linear.0.weight": torch.eye(8), "linear.0.bias": torch.zeros(8)}
    torch.save({8: (layer, layer)}, folders[1] / HYPERNETWORK)
