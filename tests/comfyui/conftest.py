"""One ComfyUI server with this pack and the reference pack for the whole session, and a line on what was skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.text_encoder_file import comfy_config

from ..browser.frontend import Frontend
from . import load_audit
from .graphs import Graph
from .qwen_models import PIPELINE, ZERO, make_qwen_pipeline, make_zero_pipeline, write_text_encoder, write_transformer
from .server import CHECKOUT, HOW_TO_GET, ComfyServer, find_comfyui

HERE = Path(__file__).resolve().parent
REFERENCE_PACK = HERE / "reference_pack"
EXAMPLE_IMAGE = "hybrid-dit-example.png"
TRUNCATED, UNSUPPORTED = "truncated", "unsupported"
"""Pipeline folders with which something is wrong."""
KLEIN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 28, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
"""A text encoder of FLUX.2 klein, which the workers do not know, as small as a context of 192 features asks for."""
SIZES = {"Mistral3Small24BConfig": comfy_config(), "Qwen3_4BConfig": KLEIN}
"""What ComfyUI's own loaders take for text encoders."""
TEST_SECONDS = 180
"""A test that takes longer hangs; the first one also starts the server and makes the pipelines."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder; without one, the tests that need a server are skipped."""
    found = find_comfyui()
    if found is None:
        pytest.skip(HOW_TO_GET)
    return found


@pytest.fixture(scope="session")
def home(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$HYBRID_DIT_HOME with the pipelines under ``models``: the demo, a tiny one and two spoiled ones."""
    from parallel_backend.drawing.demo_model import DEMO_FOLDER_NAME, demo_folder
    from tests.tiny_pipeline import make_tiny_pipeline

    home = tmp_path_factory.mktemp("home")
    models = home / "models"
    models.mkdir()
    (models / DEMO_FOLDER_NAME).symlink_to(demo_folder())
    tiny = make_tiny_pipeline(models / "tiny")

    weights = _single_file(shutil.copytree(tiny, models / TRUNCATED) / "transformer")
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)

    index = shutil.copytree(tiny, models / UNSUPPORTED) / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableCascadePipeline"}))
    return home


def _single_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture(scope="session")
def example_image() -> Image.Image:
    """The picture that the example workflows load."""
    shipped = CHECKOUT / "workflows" / EXAMPLE_IMAGE
    if shipped.is_file():
        return Image.open(shipped).convert("RGB")
    picture = Image.new("RGB", (256, 256), (128, 128, 128))
    ImageDraw.Draw(picture).ellipse((48, 48, 208, 208), fill=(220, 30, 30))
    return picture


@pytest.fixture
def graph() -> Graph:
    """An empty graph."""
    return Graph()


def new_server(comfyui: Path, home: Path) -> ComfyServer:
    """A server with the tests' pipelines and the reference pack, whose own loaders take small text encoders."""
    return ComfyServer(
        comfyui=comfyui,
        diffusers_folder=home / "models",
        packs=[REFERENCE_PACK, HERE / "small_sizes"],
        environment={
            "HYBRID_DIT_HOME": str(home),
            "HYBRID_DIT_TEST_SIZES": json.dumps(SIZES),
            "HYBRID_DIT_TEST_HOOKS": load_audit.__file__,
            load_audit.LOG: str(home / "load.log"),
        },
    )


@pytest.fixture(scope="session")
def server(comfyui: Path, home: Path, example_image: Image.Image) -> Iterator[ComfyServer]:
    """The session's server. Tests that kill a server make one of their own."""
    with new_server(comfyui, home) as server:
        server.add_input_image(EXAMPLE_IMAGE, example_image)
        yield server


@pytest.fixture(scope="package")
def frontend(server: ComfyServer) -> Iterator[Frontend]:
    """The real front end of the session's server; closed before tests that may have a browser of their own."""
    with Frontend(server) as frontend:
        yield frontend


@pytest.fixture(scope="session")
def qwen(comfyui, home, server):
    """Both pipeline folders, and the first one's transformer and text encoder as files."""
    tokenizer = comfyui / "comfy" / "text_encoders" / "qwen25_tokenizer"
    folder = make_qwen_pipeline(home / "models" / PIPELINE, tokenizer)
    zero = make_zero_pipeline(home / "models" / ZERO, folder)
    for kind in ("diffusion_models", "text_encoders"):
        (server.models / kind).mkdir(parents=True, exist_ok=True)
    write_transformer(server.models / "diffusion_models" / "qwen.safetensors", folder)
    write_transformer(server.models / "diffusion_models" / "qwen_zero.safetensors", zero)
    write_text_encoder(server.models / "text_encoders" / "qwen.safetensors", folder)
    return server
