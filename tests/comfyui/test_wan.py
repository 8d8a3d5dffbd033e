"""Wan: our MODEL against ComfyUI's own with the same file, through its own loader, text encoder and samplers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.errors import relative_error
from tests.single_file import to_fp8, write
from tests.wan_file import CONTEXT, IMAGE, wan_shapes, wan_tensors

from .cache_graphs import add_cache, counts, runs
from .graphs import Graph, NodeId, add_layout, run_well, save_latent, saved_latent, unload
from .processes import worker_ranks
from .server import ComfyServer
from .test_errors import failure

TOLERANCE = 1e-4
"""Of the relative error of latents; see test_model.TOLERANCE."""
DIFFERENT = 1e-2
HIGH, LOW, FP8, DEQUANTIZED = (f"wan_{kind}.safetensors" for kind in ("high", "low", "fp8_scaled", "dequantized"))
LAYOUTS = {"Ulysses-2": {"ulysses": 2, "tp": 1}, "TP-2": {"ulysses": 1, "tp": 2}}
LONG = "a red circle on a blue square, highly detailed, " * 4
FRAMES, HEIGHT, WIDTH = 3, 6, 10
"""Of the latent: odd numbers of tokens over two ranks."""

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Variant:
    """One of Wan's models.

    Args:
        size: of its file (`wan_file.wan_shapes`).
        values: shapes of what a node puts into its conditioning.
        latent: channels, given frames, and how much of them is drawn all the same; None: an empty latent.
        batch: of videos.
        side: rows of the latent.
    """

    size: dict[str, Any] = field(default_factory=dict)
    values: dict[str, list[int]] = field(default_factory=dict)
    latent: tuple[int, int, float] | None = None
    batch: int = 1
    side: int = HEIGHT


IMAGE_VALUES = {"concat_latent_image": [1, 16, FRAMES, HEIGHT, WIDTH], "concat_mask": [1, 1, FRAMES, HEIGHT, WIDTH]}
I2V = {"channels": 36, "image": True}
FUN = {"channels": 52, "first_frame": 16}
CONTROL = {"concat_latent_image": [1, 32, FRAMES, HEIGHT, WIDTH]}
FIRST = {"reference_latents": [1, 16, 1, HEIGHT, WIDTH]}
VARIANTS = {
    "T2V": Variant(),
    "T2V, odd rows, a batch": Variant(batch=2, side=5),
    "I2V 2.2": Variant({"channels": 36}, IMAGE_VALUES),
    "I2V 2.2 without an image": Variant({"channels": 36}),
    "I2V 2.1": Variant(I2V, {**IMAGE_VALUES, "clip_vision_output": [1, 257, IMAGE]}),
    "I2V 2.1 without vision": Variant(I2V, IMAGE_VALUES),
    "FLF2V 2.1": Variant({**I2V, "image_places": 14}, {**IMAGE_VALUES, "clip_vision_output": [1, 14, IMAGE]}),
    "TI2V 5B": Variant({"channels": 48, "out": 48}, latent=(48, 0, 0.0)),
    "TI2V 5B from an image": Variant({"channels": 48, "out": 48}, latent=(48, 1, 0.0), batch=2),
    "TI2V 5B, soft mask": Variant({"channels": 48, "out": 48}, latent=(48, 2, 0.4)),
    "Fun Control 2.2": Variant(FUN, {**CONTROL, **FIRST}),
    "Fun Control 2.2 without a reference": Variant(FUN, CONTROL),
    "Fun Control 2.1": Variant({**I2V, "channels": 48}, {**CONTROL, "clip_vision_output": [1, 257, IMAGE]}),
    "Phantom": Variant(values={"time_dim_concat": [1, 16, 2, HEIGHT, WIDTH]}),
    "Bernini": Variant(values={"context_latents": [1, 16, 2, 4, 6]}),
}


@pytest.fixture(scope="module")
def wan(server: ComfyServer) -> ComfyServer:
    folder = server.models / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS.values():
        if not (folder / file_of(variant)).exists():
            write(folder / file_of(variant), wan_tensors(**variant.size))
    write(folder / HIGH, wan_tensors(1))
    write(folder / LOW, wan_tensors(2))
    stored, _ = to_fp8(wan_tensors(1), "scaled_fp8", part=".weight")
    write(folder / FP8, stored)
    write(folder / DEQUANTIZED, from_fp8(stored))
    return server


def from_fp8(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file with scales stands for."""
    meant = {name: tensor.float() for name, tensor in stored.items() if "scale" not in name}
    for name, tensor in stored.items():
        if name.endswith(".scale_weight"):
            meant[name.replace("scale_weight", "weight")] *= tensor
    return meant


def file_of(variant: Variant) -> str:
    return "wan" + "".join(f"_{name}{value}" for name, value in sorted(variant.size.items())) + ".safetensors"


def add_model(graph: Graph, who: str, name: str) -> NodeId:
    """ComfyUI's, or ours on a layout."""
    if who in LAYOUTS:
        return graph.add("HybridDiT_LoadDiffusionModel", unet_name=name, layout=add_layout(graph, **LAYOUTS[who]))
    return graph.add("UNETLoader", unet_name=name, weight_dtype="default")


def add_text(graph: Graph, text: str, values: dict[str, list[int]] | None = None, seed: int = 0) -> NodeId:
    node = graph.add("ReferenceText", text=text, features=CONTEXT)
    return (
        graph.add("ReferenceConditioning", conditioning=node, values=json.dumps(values), seed=seed) if values else node
    )


def add_video(graph: Graph, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, batch: int = 1) -> NodeId:
    pixels = {"width": 8 * width, "height": 8 * height, "length": 4 * frames - 3, "batch_size": batch}
    return graph.add("EmptyHunyuanLatentVideo", **pixels)


def add_sampler(graph: Graph, model: Any, latent: Any, values: dict[str, list[int]], **changes: Any) -> NodeId:
    """Two steps with CFG, whose prompts are of different lengths."""
    inputs = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs |= {"positive": add_text(graph, LONG, values), "negative": add_text(graph, "blurry", values)}
    sampled = graph.add("ModelSamplingSD3", model=model, shift=5.0)
    return graph.add("KSampler", model=sampled, latent_image=latent, **{**inputs, **changes})


def add_variant(graph: Graph, who: str, variant: Variant) -> NodeId:
    if variant.latent is None:
        latent = add_video(graph, height=variant.side, batch=variant.batch)
    else:
        channels, given, soft = variant.latent
        shape = json.dumps([variant.batch, channels, FRAMES, variant.side, WIDTH])
        latent = graph.add("ReferenceVideoLatent", shape=shape, given=given, soft=soft)
    return add_sampler(graph, add_model(graph, who, file_of(variant)), latent, variant.values)


def add_experts(graph: Graph, high: Any, low: Any, steps: int = 4, cfg: float = 3.5, **changes: Any) -> NodeId:
    """As the template has it: the second begins in mid-run, with the noise that the first has left."""
    texts = {"positive": add_text(graph, LONG), "negative": add_text(graph, "blurry")}
    same = {"noise_seed": 7, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", **texts}
    same |= changes
    latent = add_video(graph)
    for model, noise, first, last in ((high, "enable", 0, steps // 2), (low, "disable", steps // 2, 10000)):
        latent = graph.add(
            "KSamplerAdvanced", model=graph.add("ModelSamplingSD3", model=model, shift=5.0), add_noise=noise,
            start_at_step=first, end_at_step=last, return_with_leftover_noise=noise, latent_image=latent, **same,
        )  # fmt: skip
    return latent


Latents = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def latents(wan: ComfyServer) -> Latents:
    """Who computes it (ComfyUI, or a layout of ours) -> variant, or the two experts -> the latent."""

    @functools.cache
    def run(who: str) -> dict[str, Tensor]:
        graph = Graph()
        saves = {name: save_latent(graph, add_variant(graph, who, variant)) for name, variant in VARIANTS.items()}
        experts = add_experts(graph, *(add_model(graph, who, name) for name in (HIGH, LOW)))
        saves["two experts"] = save_latent(graph, experts)
        result = run_well(wan, graph, timeout=240)
        return {name: saved_latent(wan, result, save) for name, save in saves.items()}

    return run


# tests/distributed has each variant on every layout.
EITHER = [pytest.param("Ulysses-2", marks=pytest.mark.thorough), "TP-2"]


@pytest.mark.parametrize("layout", EITHER)
@pytest.mark.parametrize("case", [*VARIANTS, "two experts"])
def test_same_latent(case: str, layout: str, latents: Latents):
    ours, theirs = latents(layout)[case], latents("ComfyUI")[case]
    variant = VARIANTS.get(case, Variant())
    channels = 16 if variant.latent is None else variant.latent[0]
    assert tuple(theirs.shape) == (variant.batch, channels, FRAMES, variant.side, WIDTH)
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) <= TOLERANCE


def test_cases_differ(latents: Latents):
    """Proof that the comparison can fail: what is in a conditioning, and each expert, reaches the latent."""
    ours = latents("TP-2")
    for with_it, without in (
        ("I2V 2.2", "I2V 2.2 without an image"),
        ("I2V 2.1", "I2V 2.1 without vision"),
        ("TI2V 5B", "TI2V 5B, soft mask"),
        ("Fun Control 2.2", "Fun Control 2.2 without a reference"),
        ("Phantom", "T2V"),
        ("Bernini", "T2V"),
    ):
        assert relative_error(ours[with_it], ours[without]) > DIFFERENT, with_it
    assert relative_error(*ours["T2V, odd rows, a batch"].split(1)) > DIFFERENT


def latents_of(server: ComfyServer, graph: Graph, *samples: NodeId) -> list[Tensor]:
    saves = [save_latent(graph, one) for one in samples]
    result = run_well(server, graph, timeout=240)
    return [saved_latent(server, result, save) for save in saves]


@pytest.mark.parametrize("layout", EITHER)
def test_fp8_scaled(wan: ComfyServer, latents: Latents, layout: str):
    graph = Graph()
    experts = (
        add_experts(graph, add_model(graph, layout, FP8), add_model(graph, layout, LOW)),
        add_experts(graph, add_model(graph, "ComfyUI", DEQUANTIZED), add_model(graph, "ComfyUI", LOW)),
    )
    ours, theirs = latents_of(wan, graph, *experts)
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(ours, latents("ComfyUI")["two experts"]) > 1e-3  # the file is not the one in fp32


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.thorough)])
def test_files_in_16_bits(wan: ComfyServer, dtype: str):
    name = f"wan_{dtype}.safetensors"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in wan_tensors(1).items()}
    write(wan.models / "diffusion_models" / name, tensors)
    write(wan.models / "diffusion_models" / f"float_{name}", {key: tensor.float() for key, tensor in tensors.items()})
    graph = Graph()
    samplers = [
        add_sampler(graph, add_model(graph, who, file), add_video(graph), {})
        for who, file in (("TP-2", name), ("ComfyUI", f"float_{name}"))
    ]
    ours, theirs = latents_of(wan, graph, *samplers)
    assert relative_error(ours, theirs) <= TOLERANCE


def write_lora(server: ComfyServer, name: str, tensors: dict[str, Tensor]) -> None:
    folder = server.models / "loras"
    folder.mkdir(exist_ok=True)
    write(folder / name, tensors)


def lora(seed: int, **size: Any) -> dict[str, Tensor]:
    """Of all of a block's linears, as lightx2v names them, with an alpha on some."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in wan_shapes(**size).items():
        if name.startswith("blocks.") and len(shape) == 2:
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, shape[1], generator=generator) / shape[1] ** 0.5
            tensors[f"{key}.lora_up.weight"] = torch.randn(shape[0], 4, generator=generator) / 4
            if "cross_attn" in key:
                tensors[f"{key}.alpha"] = torch.tensor(2)
    return tensors


def differences() -> dict[str, Tensor]:
    """Of everything that is no matrix of a block, too, as other distillations have it."""
    generator, tensors = torch.Generator().manual_seed(8), {}
    ends = {"weight": "diff", "bias": "diff_b"}
    for name, shape in wan_shapes().items():
        layer, _, kind = name.rpartition(".")
        if kind in ends:
            tensors[f"diffusion_model.{layer}.{ends[kind]}"] = 0.02 * torch.randn(shape, generator=generator)
    return tensors


@pytest.mark.parametrize(
    ("file", "stock", "kind"),
    [
        pytest.param(HIGH, HIGH, "lora", marks=pytest.mark.thorough),
        (FP8, DEQUANTIZED, "lora"),
        (HIGH, HIGH, "differences"),
    ],
)
def test_a_lora_on_each_expert(wan: ComfyServer, file: str, stock: str, kind: str):
    """As lightx2v's 4 steps are used; each expert has its own, and without them everything is as it was."""
    names = [f"wan_{kind}_{seed}.safetensors" for seed in (1, 2)]
    for seed, name in enumerate(names):
        write_lora(wan, name, lora(seed) if kind == "lora" else differences())
    graph = Graph()
    samplers = []
    for who, high in (("TP-2", file), ("ComfyUI", stock)):
        models = [add_model(graph, who, name) for name in (high, LOW)]
        changed = [
            graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
            for model, name in zip(models, names, strict=True)
        ]
        samplers += [add_experts(graph, *changed, cfg=1.0), add_experts(graph, *models, cfg=1.0)]
    ours, without, theirs, theirs_without = latents_of(wan, graph, *samplers)
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(without, theirs_without) <= TOLERANCE
    assert relative_error(ours, without) > DIFFERENT


def test_block_cache(wan: ComfyServer):
    """Each expert has a cache of its own, over its part of the steps."""
    graph = Graph()
    models = [add_model(graph, "Ulysses-2", name) for name in (HIGH, LOW)]
    caches = [[add_cache(graph, model, residual_diff_threshold=limit) for model in models] for limit in (1.0, 0.0)]
    samplers = [add_experts(graph, *pair, steps=8) for pair in (*caches, models)]
    saves = [save_latent(graph, one) for one in samplers]
    result = run_well(wan, graph, timeout=240)
    cached, never, uncached = (saved_latent(wan, result, save) for save in saves)
    assert [counts(run) for pair in caches for cache in pair for run in runs(result, cache)] == [
        (4, 4, 2), (4, 4, 2), (8, 0, 2), (8, 0, 2)
    ]  # fmt: skip
    assert torch.equal(never, uncached)
    assert 1e-4 < relative_error(cached, uncached) < 1


@pytest.mark.parametrize(
    "sampler", ["uni_pc", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("res_multistep", "heun"))]
)
def test_other_samplers(wan: ComfyServer, sampler: str):
    """uni_pc is what the templates of one model have."""
    graph = Graph()
    samplers = [
        add_sampler(graph, add_model(graph, who, HIGH), add_video(graph), {}, sampler_name=sampler, steps=4, cfg=6.0)
        for who in ("Ulysses-2", "ComfyUI")
    ]
    ours, theirs = latents_of(wan, graph, *samplers)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_a_part_of_a_video_is_drawn_anew(wan: ComfyServer):
    """A noise mask on a model that knows nothing of it: ComfyUI blends, and timesteps are of samples."""
    graph, samplers = Graph(), []
    for who in ("TP-2", "ComfyUI"):
        latent = graph.add("ReferenceVideoLatent", shape=json.dumps([1, 16, FRAMES, HEIGHT, WIDTH]), given=1, soft=0.0)
        samplers.append(add_sampler(graph, add_model(graph, who, HIGH), latent, {}))
    ours, theirs = latents_of(wan, graph, *samplers)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_both_experts_are_in_one_group(wan: ComfyServer):
    graph = Graph()
    models = [add_model(graph, "TP-2", name) for name in (HIGH, LOW)]
    save_latent(graph, add_experts(graph, *models, noise_seed=8))
    unload(wan)
    run_well(wan, graph)
    reports = [graph.add("HybridDiT_WorkersReport", model=model) for model in models]
    result = run_well(wan, graph)
    found = [json.loads(result.outputs[str(node)]["text"][0]) for node in reports]
    assert sorted(worker_ranks(wan).values()) == [0, 1]
    for report in found:
        assert report["model"]["family"] == "wan"
        # Neither had to leave for the other.
        assert all(rank["places"]["transformer"] == "device" for rank in report["ranks"])
    assert len({report["model"]["path"] for report in found}) == 2


def test_what_is_refused(wan: ComfyServer):
    graph = Graph()
    values = {"time_dim_concat": [1, 16, 2, HEIGHT, WIDTH]}
    node = add_sampler(graph, add_model(graph, "TP-2", file_of(VARIANTS["I2V 2.2"])), add_video(graph), values)
    save_latent(graph, node)
    text = failure(wan, graph, node)
    assert "to go behind the video (as of Phantom), which a model of 36 input channels does not take" in text
