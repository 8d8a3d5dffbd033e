"""ComfyUI's own templates of Wan with only their diffusion model loaders replaced: the same videos.

Each is opened in the real front end. Diffusion models and LoRAs have the names that it asks for and are small and
random; what stands for text encoder, vision encoder and VAE is random, too, and the same on both sides.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.errors import relative_error
from tests.single_file import to_fp8, write
from tests.wan_file import CONTEXT, IMAGE, wan_tensors

from ..browser.edits import replace, wire
from ..browser.frontend import Frontend, what_is_missing
from .graphs import Graph, run_well, saved_latent
from .server import CHECKOUT, ComfyServer
from .template_models import all_nodes
from .test_templates import LAYOUT, LOADER, Prompt, fetch_template, linked, picture, show
from .test_wan import TOLERANCE, from_fp8, lora, write_lora

DIFFERENT = 1e-2
SIDE, FRAMES = 64, 9
IMAGES, FLF_IMAGES = 257, 514
VALUES = {"width": SIDE, "height": SIDE, "length": FRAMES}
STEPS = {"KSampler": {"steps": 2}, "KSamplerAdvanced": {"steps": 4, "start_at_step": 2, "end_at_step": 2}}
NUMBERS = {20: 4, 10: 2}
"""What a template has in nodes for numbers, of steps, and what is here."""
DENSE = "dense_"
"""In front of the name of what a file in fp8 stands for, in fp32."""
SECONDS, FRAMES_A_SECOND = 5, 16
"""Of a template that reckons with them."""
SKIPS_LAYERS = "SkipLayerGuidanceDiT"

pytestmark = [
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(300),
]


@dataclass(frozen=True)
class Template:
    """What a test has to know of one.

    Args:
        size: of its files (`wan_file.wan_shapes`).
        loaders: of diffusion models.
        vae: channels of a latent, and pixels to a position.
        vision: tokens of an image.
        thorough: whether others show as much.
    """

    size: dict[str, Any] = field(default_factory=dict)
    loaders: int = 1
    vae: tuple[int, int] = (16, 8)
    vision: int = IMAGES
    thorough: bool = False


I2V, I2V_21, LARGE_VAE = {"channels": 36}, {"channels": 36, "image": True}, (48, 16)
TEMPLATES = {
    "video_wan2_2_14B_i2v": Template(I2V, 2, thorough=True),
    "video_wan2_2_14B_flf2v": Template(I2V, 2, thorough=True),
    "video_wan2_2_5B_ti2v": Template({"channels": 48, "out": 48}, vae=LARGE_VAE),
    "text_to_video_wan": Template(thorough=True),
    "image_to_video_wan": Template(I2V_21, thorough=True),
    "wan2.1_flf2v_720_f16": Template({**I2V_21, "image_places": FLF_IMAGES}, vision=IMAGES),
    "video_wan2_2_14B_fun_inpaint": Template(I2V, 2, thorough=True),
    "video_wan2_2_14B_fun_control": Template({"channels": 52, "first_frame": 16}, 2),
    "video_wan2_2_5B_fun_control": Template(
        {"channels": 148, "out": 48, "first_frame": 48}, vae=LARGE_VAE, thorough=True
    ),
    "video_wan2_2_5B_fun_inpaint": Template({"channels": 100, "out": 48}, vae=LARGE_VAE, thorough=True),
    "wan2.1_fun_control": Template({"channels": 48, "image": True}, thorough=True),
    "wan2.1_fun_inp": Template(I2V_21, thorough=True),
}
T2V = "video_wan2_2_14B_t2v"
SHIPPED = "13_wan2_2_text_to_video"


def write_files(server: ComfyServer, workflow: dict[str, Any], size: dict[str, Any]) -> None:
    """The files and inputs that a template names."""
    models = [model for node in all_nodes(workflow) for model in node.get("properties", {}).get("models", [])]
    for model in models:
        path = server.models / model["directory"] / model["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(path.name.encode())
        if model["directory"] == "diffusion_models":
            write_model(path, wan_tensors(seed, **size))
        elif model["directory"] == "loras":
            write_lora(server, path.name, lora(seed))
        elif not path.exists():
            write(path, {"nothing": torch.zeros(1)})
    for number, node in enumerate(all_nodes(workflow)):
        name = str((node.get("widgets_values") or [""])[0])
        if node["type"] == "LoadImage":
            server.add_input_image(name, picture(number))
        elif node["type"] == "LoadVideo":
            write_video(server, name, number)


def write_model(path: Path, tensors: dict[str, Tensor]) -> None:
    """As the name says: in fp8 with scales, or in 16 bits."""
    if "fp8_scaled" in path.name:
        stored, _ = to_fp8(tensors, "scaled_fp8", part=".weight")
        write(path, stored)
        write(path.with_name(DENSE + path.name), from_fp8(stored))
    else:
        dtype = torch.bfloat16 if "bf16" in path.name else torch.float16
        write(path, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def write_video(server: ComfyServer, name: str, number: int) -> None:
    """A short video, made by ComfyUI itself, where LoadVideo finds it."""
    graph = Graph()
    frames = [graph.add("LoadImage", image=server.add_input_image(f"f{i}.png", picture(number + i))) for i in range(2)]
    batch = graph.add("ImageBatch", image1=frames[0], image2=frames[1])
    batch = graph.add("RepeatImageBatch", image=batch, amount=FRAMES // 2 + 1)
    video = graph.add("CreateVideo", images=batch, fps=16.0)
    save = graph.add("SaveVideo", video=video, filename_prefix=f"made/{number}", format="mp4", codec="h264")
    (file,) = run_well(server, graph).outputs[str(save)]["images"]
    made = server.output / file["subfolder"] / file["filename"]
    (server.input / name).write_bytes(made.read_bytes())


def small(prompt: Prompt, template: Template) -> Prompt:
    """A graph of a short, small video in few steps, whose text encoder, vision encoder and VAE are random."""
    stand_ins = {
        "CLIPLoader": ("ReferenceRandomClip", {"features": CONTEXT}),
        "CLIPVisionLoader": ("ReferenceVision", {"tokens": template.vision, "features": IMAGE}),
        "VAELoader": ("ReferenceVideoVae", dict(zip(("channels", "downscale"), template.vae, strict=True))),
    }
    found = copy.deepcopy(prompt)
    for node in found.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in stand_ins:
            node["class_type"], node["inputs"] = stand_ins[kind]
            continue
        for name, value in {**VALUES, **STEPS.get(kind, {})}.items():
            if not isinstance(inputs.get(name, []), list) and not (name == "start_at_step" and inputs[name] == 0):
                inputs[name] = 10000 if name == "end_at_step" and inputs["start_at_step"] == 2 else value
        if kind == "PrimitiveInt":
            inputs["value"] = NUMBERS.get(inputs["value"], inputs["value"])
        elif kind == "PrimitiveFloat" and inputs["value"] == SECONDS:
            inputs["value"] = (FRAMES - 1) / FRAMES_A_SECOND
    return found


def without_skipped_layers(prompt: Prompt) -> Prompt:
    """The node that skips blocks is bypassed."""
    moved = {key: node["inputs"]["model"] for key, node in prompt.items() if node["class_type"] == SKIPS_LAYERS}
    found = {key: copy.deepcopy(node) for key, node in prompt.items() if key not in moved}
    for node in found.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in moved:
                node["inputs"][name] = moved[value[0]]
    return found


def with_our_loaders(prompt: Prompt) -> Prompt:
    found = copy.deepcopy(prompt)
    for node in found.values():
        if node["class_type"] == "UNETLoader":
            node["class_type"] = LOADER
            node["inputs"] = {"unet_name": node["inputs"]["unet_name"], "layout": ["layout", 0]}
    options = {"ulysses": 2, "ring": 1, "tp": 1, "devices": "cpu", "auto": False}
    return {**found, "layout": {"class_type": LAYOUT, "inputs": options}}


def with_dense_files(prompt: Prompt) -> Prompt:
    """Where a LoRA is on: ComfyUI rounds what it makes of a weight to 8 bits again, ours keeps it beside the weight."""
    found = copy.deepcopy(prompt)
    for node in found.values():
        if node["class_type"] == "UNETLoader" and "fp8_scaled" in node["inputs"]["unet_name"]:
            node["inputs"]["unet_name"] = DENSE + node["inputs"]["unet_name"]
    return found


def last_latent(server: ComfyServer, prompt: Prompt) -> Tensor:
    """What a graph decodes; all of it runs, and a video is saved."""
    (decode,) = [node for node in prompt.values() if node["class_type"] == "VAEDecode"]
    save = {"class_type": "SaveLatent", "inputs": {"samples": decode["inputs"]["samples"], "filename_prefix": "wan/t"}}
    result = run_well(server, {**prompt, "save": save}, timeout=240)
    videos = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    assert [len(result.outputs[key]["images"]) for key in videos] == [1]
    return saved_latent(server, result, "save")  # type: ignore[arg-type]


def other_words(prompt: Prompt) -> Prompt:
    found = copy.deepcopy(prompt)
    for node in found.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = "a cat"
    return found


@pytest.fixture(scope="module")
def t2v(server: ComfyServer, frontend: Frontend) -> tuple[Prompt, Prompt]:
    """The template of two experts as it comes, and with both loaders replaced in the page, as by hand."""
    workflow = fetch_template(server, T2V)
    write_files(server, workflow, {})
    show(frontend, workflow, T2V)
    stock = frontend.prompt()
    replaced = [replace(frontend, "UNETLoader", LOADER, of=count) for count in (2, 1)]
    layout = wire(frontend, LAYOUT, "layout", devices="cpu", auto=False, ulysses=2)
    ours = frontend.prompt()
    moved = {one.old: [one.new, one.output] for one in replaced}
    new = {layout, *(one.new for one in replaced)}
    assert [one.lost for one in replaced] == [[], []]
    assert linked(stock, moved) == {key: node for key, node in linked(ours, {}).items() if key not in new}
    for one in replaced:
        name = stock[one.old]["inputs"]["unet_name"]
        assert ours[one.new]["inputs"] == {"unet_name": name, "weight_dtype": "default", "layout": [layout, 0]}
    return stock, ours


# test_template has two experts with CFG, too.
@pytest.mark.parametrize(
    "on", [pytest.param(False, marks=pytest.mark.thorough), True], ids=["20 steps", "4 steps with lightx2v"]
)
def test_two_experts(server: ComfyServer, t2v: tuple[Prompt, Prompt], on: bool):
    """The switch chooses CFG and 20 steps, or both LoRAs and 4."""
    stock, ours = (small(prompt, Template()) for prompt in t2v)
    for prompt in (stock, ours):
        (switch,) = [node for node in prompt.values() if node["class_type"] == "PrimitiveBoolean"]
        assert switch["inputs"]["value"] is False
        switch["inputs"]["value"] = on
    if on:
        stock = with_dense_files(stock)
    drawn, theirs = last_latent(server, ours), last_latent(server, stock)
    assert tuple(drawn.shape) == (1, 16, 3, SIDE // 8, SIDE // 8)
    assert relative_error(drawn, theirs) <= TOLERANCE
    assert relative_error(last_latent(server, other_words(ours)), drawn) > DIFFERENT


@pytest.mark.thorough  # test_workflow_formats and test_template show its parts
def test_the_shipped_workflow(server: ComfyServer, frontend: Frontend):
    """It draws what stock loaders do, as it is sent to ComfyUI and as the page opens it."""
    prompt = json.loads((CHECKOUT / "workflows" / "api" / f"{SHIPPED}.json").read_text())
    workflow = json.loads((CHECKOUT / "workflows" / f"{SHIPPED}.json").read_text())
    write_files(server, workflow, {})
    show(frontend, workflow, SHIPPED)
    assert linked(frontend.prompt(), {}) == linked(prompt, {})
    ours = small(prompt, Template())
    stock = {key: node for key, node in copy.deepcopy(ours).items() if node["class_type"] != LAYOUT}
    for node in ours.values():
        if node["class_type"] == LAYOUT:
            node["inputs"] |= {"auto": False, "ulysses": 2, "devices": "cpu"}
    replaced = [node for node in stock.values() if node["class_type"] == LOADER]
    assert len(replaced) == 2
    for node in replaced:
        node["class_type"] = "UNETLoader"
        del node["inputs"]["layout"]
    drawn = last_latent(server, ours)
    assert tuple(drawn.shape) == (1, 16, 3, SIDE // 8, SIDE // 8)
    assert drawn.std() > 0.1
    assert relative_error(drawn, last_latent(server, stock)) <= TOLERANCE


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * one.thorough) for name, one in TEMPLATES.items()]
)
def test_template(server: ComfyServer, frontend: Frontend, name: str):
    template, workflow = TEMPLATES[name], fetch_template(server, name)
    write_files(server, workflow, template.size)
    show(frontend, workflow, name)
    prompt = without_skipped_layers(small(frontend.prompt(), template))
    assert sum(node["class_type"] == "UNETLoader" for node in prompt.values()) == template.loaders
    ours = with_our_loaders(prompt)
    kinds = {node["class_type"] for node in prompt.values()}
    has_lora = "LoraLoaderModelOnly" in kinds and "ComfySwitchNode" not in kinds  # which leaves it out
    stock = with_dense_files(prompt) if has_lora else prompt
    drawn, theirs = last_latent(server, ours), last_latent(server, stock)
    assert drawn.std() > 0.1
    assert relative_error(drawn, theirs) <= TOLERANCE
    assert relative_error(last_latent(server, other_words(ours)), drawn) > DIFFERENT


def test_an_image_for_the_5b_model(server: ComfyServer):
    """Its template's Load Image is bypassed; with it the first frame is given, and has a timestep of its own."""
    template, workflow = TEMPLATES["video_wan2_2_5B_ti2v"], fetch_template(server, "video_wan2_2_5B_ti2v")
    write_files(server, workflow, template.size)
    server.add_input_image("example.png", picture(3))
    drawn = []
    for who in ("ours", "stock", "without"):
        graph = Graph()
        model: Any = graph.add("UNETLoader", unet_name="wan2.2_ti2v_5B_fp16.safetensors", weight_dtype="default")
        vae, clip = graph.add("VAELoader", vae_name="pixel_space"), graph.add("CLIPLoader", clip_name="", type="wan")
        image = {} if who == "without" else {"start_image": graph.add("LoadImage", image="example.png")}
        latent = graph.add("Wan22ImageToVideoLatent", vae=vae, **VALUES, batch_size=1, **image)
        texts = [graph.add("CLIPTextEncode", text=text, clip=clip) for text in ("a dog in the snow", "blurry")]
        model = graph.add("ModelSamplingSD3", model=model, shift=8.0)
        sampler = graph.add(
            "KSampler", model=model, positive=texts[0], negative=texts[1], latent_image=latent, seed=1, steps=2,
            cfg=5.0, sampler_name="uni_pc", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        frames = graph.add("VAEDecode", samples=sampler, vae=vae)
        video = graph.add("CreateVideo", images=frames, fps=24.0)
        graph.add("SaveVideo", video=video, filename_prefix="wan/v", format="auto", codec="auto")
        prompt = small(graph, template)
        drawn.append(last_latent(server, prompt if who == "stock" else with_our_loaders(prompt)))
    ours, theirs, without = drawn
    assert relative_error(ours, theirs) <= TOLERANCE
    assert relative_error(ours, without) > DIFFERENT
    assert relative_error(ours[:, :, 1:], without[:, :, 1:]) > 1e-3


def test_skipped_layers_are_refused(server: ComfyServer, frontend: Frontend):
    name = "wan2.1_fun_inp"
    workflow = fetch_template(server, name)
    write_files(server, workflow, TEMPLATES[name].size)
    show(frontend, workflow, name)
    result = server.run(with_our_loaders(small(frontend.prompt(), TEMPLATES[name])))
    assert result.error is not None
    assert '"SkipLayerGuidanceDiT" (node ' in result.error["exception_message"]
    assert (
        "patches the model's blocks (dit), which live in the parallel workers; bypass it"
        in result.error["exception_message"]
    )
