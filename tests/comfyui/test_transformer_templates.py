"""Templates of which only Load Diffusion Model is replaced; text encoder and VAE stay ComfyUI's own: the same pictures.

As in test_templates, each is opened in the real front end, on small random models of the names that it asks for.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ..browser.edits import Replaced, replace, run_all, set_widgets, wire
from ..browser.frontend import Frontend, what_is_missing
from .graphs import run_well
from .server import ComfyServer
from .template_models import QWEN3_CONFIG, REFERENCE, all_nodes, write_models
from .test_templates import LAYOUT, LOADER, MEGAPIXELS, Prompt, fetch_template, linked, picture, same, show

SIZE = (128, 96)


@dataclass(frozen=True)
class Template:
    """What a test has to know of one.

    Args:
        clip_type: of its Load CLIP.
        sizes: widgets that hold width and height; empty where an input image has them.
        steps: node that has the number of steps.
        subgraphs: numbers of those that are drawn; others are bypassed in the template, and stay so.
        stock: what stands for ComfyUI's Load Diffusion Model, if that does not take small files.
    """

    clip_type: str
    sizes: tuple[str, ...]
    steps: str
    subgraphs: tuple[int, ...] = (0,)
    stock: str = ""


TEMPLATES = {
    "image_z_image_turbo": Template("lumina2", ("width", "height"), "KSampler", stock="ReferenceZImage"),
    "image_z_image_turbo_int8": Template("lumina2", ("width", "height"), "KSampler", stock="ReferenceZImage"),
    # The base model, and the distilled one, which is bypassed.
    "image_flux2_klein_text_to_image": Template("flux2", ("value", "value_1"), "Flux2Scheduler", subgraphs=(0, 1)),
    "image_flux2_klein_image_edit_4b_distilled": Template("flux2", (), "Flux2Scheduler", subgraphs=(1,)),
}

pytestmark = [
    pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing())),
    pytest.mark.timeout(240),
]


@dataclass
class Edited:
    """A template in API form, as it comes, with ComfyUI's own classes on small files, and with ours."""

    name: str
    stock: Prompt
    reference: Prompt
    ours: Prompt
    models: list[Replaced] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)


# FLUX.2 klein's are FLUX.2-dev's but for the guider; test_templates draws our workflows of it and of Z-Image.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name.endswith("_int8") else [pytest.mark.thorough]) for name in TEMPLATES],
)
def edited(request: pytest.FixtureRequest, server: ComfyServer, frontend: Frontend) -> Edited:
    name: str = request.param
    template, workflow = TEMPLATES[name], fetch_template(server, name)
    for number, node in enumerate(node for node in all_nodes(workflow) if node["type"] == "LoadImage"):
        server.add_input_image(node["widgets_values"][0], picture(number))
    write_models(server, workflow)

    show(frontend, workflow, name)
    if len(template.subgraphs) > 1:
        run_all(frontend)
    for widget, size in zip(template.sizes, SIZE, strict=False):
        assert set_widgets(frontend, None, widget, {"*": size})
    set_widgets(frontend, "ImageScaleToTotalPixels", "megapixels", {"*": MEGAPIXELS})
    assert set_widgets(frontend, template.steps, "steps", {"*": 2})
    opened, stock = frontend.graph(), frontend.prompt()
    for number in template.subgraphs:
        _replace_clip(frontend, template, stock, number)
        if template.stock:
            (file,) = (node["inputs"]["unet_name"] for node in stock.values() if node["class_type"] == "UNETLoader")
            assert replace(frontend, "UNETLoader", template.stock, number=number, unet_name=file).lost == []
    reference = frontend.prompt()

    show(frontend, opened, name)
    edited = Edited(name, stock, reference, {})
    for number in template.subgraphs:
        edited.models.append(replace(frontend, "UNETLoader", LOADER, number=number))
        layout = {"devices": "cpu", "auto": False, "ulysses": 2}
        edited.layouts.append(wire(frontend, LAYOUT, "layout", number=number, **layout))
    with_stock_clip = frontend.prompt()
    for number in template.subgraphs:
        _replace_clip(frontend, template, stock, number)
    edited.ours = frontend.prompt()
    # Only the loader of the diffusion model is another.
    moved = {model.old: [model.new, model.output] for model in edited.models}
    ours = linked(with_stock_clip, {})
    new = {*edited.layouts, *(model.new for model in edited.models)}
    assert linked(stock, moved) == {key: node for key, node in ours.items() if key not in new}
    return edited


def _replace_clip(frontend: Frontend, template: Template, stock: Prompt, number: int) -> None:
    names = {node["inputs"]["clip_name"] for node in stock.values() if node["class_type"] == "CLIPLoader"}
    assert {node["inputs"]["type"] for node in stock.values() if node["class_type"] == "CLIPLoader"} == {
        template.clip_type
    }
    values: dict[str, Any] = {"clip_name": names.pop(), "type": template.clip_type, "config": QWEN3_CONFIG}
    assert replace(frontend, "CLIPLoader", REFERENCE, number=number, **values).lost == []


def draw_all(server: ComfyServer, prompt: Prompt) -> list[np.ndarray]:
    """All pictures of a graph, in the order of their nodes."""
    result = run_well(server, prompt)
    return [np.asarray(server.image(**file).convert("RGB")).astype(int) for file in result.files()]


def test_the_loader_has_what_it_had(edited: Edited):
    assert len(edited.models) == len(TEMPLATES[edited.name].subgraphs)
    for model, layout in zip(edited.models, edited.layouts, strict=True):
        assert model.lost == []
        # The name still comes from the subgraph's own widget, as in the template.
        unet_name = edited.stock[model.old]["inputs"]["unet_name"]
        given = {"unet_name": unet_name, "weight_dtype": "default", "layout": [layout, 0]}
        assert edited.ours[model.new]["inputs"] == given


def test_the_same_pictures_as_with_comfyuis_own_model(edited: Edited, server: ComfyServer):
    drawn = draw_all(server, edited.ours)
    assert len(drawn) == len(TEMPLATES[edited.name].subgraphs)
    for ours, theirs in zip(drawn, draw_all(server, edited.reference), strict=True):
        assert ours.std() > 10
        assert ours.shape == ((SIZE[1], SIZE[0], 3) if TEMPLATES[edited.name].sizes else theirs.shape)
        assert same(ours, theirs)
    if len(drawn) > 1:
        assert not same(*drawn)
    # Proof that the comparison can fail: other words or another input image make other pictures.
    other = copy.deepcopy(edited.ours)
    for node in other.values():
        for key in ("text", "value"):
            if isinstance(node["inputs"].get(key), str) and node["inputs"][key]:
                node["inputs"][key] = "a cat"
    assert not any(same(*pair) for pair in zip(drawn, draw_all(server, other), strict=True))
