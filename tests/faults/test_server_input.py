"""Prompts and workflow files with anything in them, given to a real server: an answer each time, and no harm done."""

from __future__ import annotations

import copy
import json
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.browser.frontend import Frontend, what_is_missing
from tests.comfyui.cache_graphs import add_cache
from tests.comfyui.graphs import Graph, add_layout, add_loader, add_sampler, save_latent, unload
from tests.comfyui.server import CHECKOUT, ComfyServer, PromptRejected
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import text_tensors, write_text

from .drawings import LAYOUT, Drawing
from .file_audit import uses_outside
from .injection import Orders
from .junk import ELSEWHERE, spoiled, spoiled_workflows
from .leaks import holdings

RUN_SECONDS = 90.0
"""A group of several ranks may have to start."""
EXAMPLES = settings.default.max_examples // (20 if settings.get_current_profile_name() == "short" else 10)
"""Prompts and files of a kind."""


@pytest.fixture(scope="module")
def forbidden(home) -> list[str]:
    """Names of a pipeline and of a file that would load, were they not outside of ComfyUI's folders."""
    folder = home / "elsewhere"
    pipeline = shutil.copytree(home / "models" / "tiny", folder / "tiny")
    file = write(folder / "transformer.safetensors", flux2_tensors(heads=4))
    relative = ["../elsewhere/tiny", "tiny/../../elsewhere/tiny", "./../elsewhere/tiny/"]
    up = "../" * 12
    return [str(pipeline), str(file), *relative, f"{up}{str(pipeline)[1:]}", f"{up}{str(file)[1:]}", f"file://{file}"]


@pytest.fixture(scope="module")
def pictures(server: ComfyServer) -> dict[str, Graph]:
    """Graphs with all nodes of the pack."""
    folder = server.models / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "input.safetensors", flux2_tensors(heads=4))
    (server.models / "text_encoders").mkdir(parents=True, exist_ok=True)
    write_text(server.models / "text_encoders" / "input.safetensors")

    of_folder = Graph()
    loader = add_loader(of_folder, **LAYOUT)
    of_folder[loader]["inputs"]["encoder_memory"] = "auto"
    layout = of_folder[of_folder[loader]["inputs"]["layout"][0]]
    layout["inputs"] |= {"nnodes": 1, "rdzv_endpoint": ""}
    cache = add_cache(of_folder, (loader, 0), taylorseer_order=1, steps_computation_mask="1,0")
    save_latent(of_folder, add_sampler(of_folder, loader, model=cache, seed=77, steps=1))
    of_folder.add("HybridDiT_WorkersReport", model=cache)

    of_files = Graph()
    layout = add_layout(of_files, **LAYOUT)
    model = of_files.add(
        "HybridDiT_LoadDiffusionModel", unet_name="input.safetensors", layout=layout, weight_dtype="default"
    )
    clip = of_files.add(
        "HybridDiT_LoadCLIP",
        clip_name="input.safetensors",
        type="flux2",
        layout=layout,
        weight_dtype="default",
        encoder_memory="auto",
    )
    positive = of_files.add("CLIPTextEncode", text="x", clip=clip)
    save_latent(of_files, add_sampler(of_files, model, positive=positive, seed=78, steps=1))

    parts = {f"model.diffusion_model.{key}": tensor for key, tensor in flux2_tensors(heads=4).items()}
    text = text_tensors()
    parts["text_encoders.tekken_model"] = text.pop("tekken_model")
    parts |= {f"text_encoders.mistral3_24b.transformer.{key}": tensor for key, tensor in text.items()}
    (server.models / "checkpoints").mkdir(parents=True, exist_ok=True)
    write(server.models / "checkpoints" / "input.safetensors", parts)
    of_checkpoint = Graph()
    checkpoint = of_checkpoint.add(
        "HybridDiT_LoadCheckpoint",
        ckpt_name="input.safetensors",
        layout=add_layout(of_checkpoint, **LAYOUT),
        weight_dtype="default",
        encoder_memory="auto",
    )
    positive = of_checkpoint.add("CLIPTextEncode", text="x", clip=(checkpoint, 1))
    save_latent(of_checkpoint, add_sampler(of_checkpoint, checkpoint, positive=positive, seed=79, steps=1))

    nothing = Graph()
    report = nothing.add("HybridDiT_WorkersReport", model=nothing.add("UNETLoader", unet_name="input.safetensors"))
    nothing.add("HybridDiT_UnloadWorkers", after=report)
    return {"a folder": of_folder, "files": of_files, "a checkpoint": of_checkpoint, "no workers": nothing}


def names_of_inputs(graph: Graph) -> dict[str, list[str]]:
    """Of the pack's nodes in a graph."""
    return {
        node: sorted(content["inputs"])
        for node, content in graph.items()
        if content["class_type"].startswith("HybridDiT_")
    }


@pytest.fixture(scope="module")
def unharmed(server: ComfyServer, orders: Orders, home: Path):
    """Around all tests here: the same process draws the same picture, holds no more than before, and wrote nowhere."""
    picture = Drawing("unharmed", seed=4)
    before = picture.run_well(server)
    unload(server)
    held, process = holdings(server), server.process
    log = orders.folder / "files.log"
    log.write_text("")
    yield
    assert torch.equal(picture.run_well(server), before)
    unload(server)
    assert server.process is process
    assert process is not None
    assert process.poll() is None
    grown = holdings(server).more_than(held, slack=2)
    grown.pop("threads", None)  # ComfyUI keeps those that serve the files of a page
    assert not grown
    allowed = [server.base, orders.folder, home / "logs", Path(server.environment["TMPDIR"])]
    outside = uses_outside(log, allowed)
    assert not outside, "\n".join(sorted(outside))


def answered(server: ComfyServer, prompt: dict) -> str:
    """Give a prompt to the server: it is refused with a reason, or runs to its end or to an error of a node."""
    try:
        result = server.run(prompt, timeout=RUN_SECONDS)
    except PromptRejected as refused:
        reasons = refused.details
    except urllib.error.HTTPError as error:
        raise AssertionError(f"HTTP {error.code} for {json.dumps(prompt)}: {error.read()[:500]!r}") from None
    else:
        reasons = None
    if reasons is not None:
        assert reasons["node_errors"] or reasons["error"]["message"]
        return "refused"
    if result.error is None:
        return "ran"
    assert result.error["exception_message"].strip()
    return "failed"


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("kind", ["a folder", "files", "no workers"])
def test_prompts(server: ComfyServer, pictures, forbidden, kind):
    graph = pictures[kind]
    answers = {"refused": 0, "failed": 0, "ran": 0}

    # Those that need no workers cost little, and few of them are wrong.
    count = settings.default.max_examples // 10 if kind == "no workers" else EXAMPLES

    @settings(suppress_health_check=list(HealthCheck), max_examples=count)
    @given(spoiled(graph, names_of_inputs(graph), forbidden))
    def try_out(prompt):
        answers[answered(server, prompt)] += 1

    try_out()
    print(f"prompts of {kind}: {answers}")
    # What one value alone cannot tell is told when its node runs, and what is left out has a default.
    assert answers["refused"] + answers["failed"] > 0
    assert answers["ran"] > 0


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("kind", "class_type", "name"),
    [("a folder", "HybridDiT_LoadPipeline", "pipeline"), ("files", "HybridDiT_LoadDiffusionModel", "unet_name"),
     ("files", "HybridDiT_LoadCLIP", "clip_name"), ("a checkpoint", "HybridDiT_LoadCheckpoint", "ckpt_name")],
)  # fmt: skip
def test_names_that_are_paths(server: ComfyServer, pictures, forbidden, kind, class_type, name):
    for path in (*forbidden, *ELSEWHERE):
        prompt = copy.deepcopy(pictures[kind])
        (loader,) = (node for node in prompt.values() if node["class_type"] == class_type)
        loader["inputs"][name] = path
        assert answered(server, prompt) == "refused", path


# The page opens a workflow, whatever becomes of it, and says what it would queue; null where it cannot.
OPEN = """async text => {
  try {
    await app.loadGraphData(JSON.parse(text));
    return (await app.graphToPrompt()).output;
  } catch (error) {
    return null;
  }
}"""


@pytest.fixture(scope="module")
def frontend(server: ComfyServer):
    """A page of the frontend, after all prompts: Playwright's loop and pytest's timeouts do not mix otherwise."""
    missing = what_is_missing()
    if missing is not None:
        pytest.skip(missing)
    with Frontend(server) as frontend:
        yield frontend


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("unharmed")
def test_workflow_files(server: ComfyServer, frontend: Frontend, forbidden):
    workflow = json.loads((CHECKOUT / "workflows" / "05_demo_block_cache.json").read_text())
    for node in workflow["nodes"]:
        if node["type"] == "EmptyFlux2LatentImage":
            node["widgets_values"] = [64, 64, 1]
        elif node["type"] == "KSampler":
            node["widgets_values"][2] = 1  # step
    proper = frontend.call(OPEN, json.dumps(workflow))
    answers = {"not opened": 0, "refused": 0, "failed": 0, "ran": 0}

    @settings(suppress_health_check=list(HealthCheck), max_examples=EXAMPLES)
    @given(spoiled_workflows(workflow, forbidden))
    def try_out(spoilt):
        prompt = frontend.call(OPEN, json.dumps(spoilt))
        answers["not opened" if not prompt else answered(server, prompt)] += 1

    try_out()
    print(f"workflows: {answers}")
    assert answers["refused"] > 0
    assert answers["ran"] > 0
    assert frontend.call(OPEN, json.dumps(workflow)) == proper
    assert not [error for error in frontend.errors if "hybrid" in error.lower()]
