"""Load Diffusion Model (Parallel) in the place of ComfyUI's own loader: the same file, the same latents."""

from __future__ import annotations

import json

import pytest

from parallel_backend.parallel.formats import FORMATS as KNOWN
from tests.errors import relative_error
from tests.quantized_file import FORMATS, NATIVE, needs_kitchen, quantize
from tests.single_file import flux2_tensors, to_fp8, to_fp8_rows, write

from .graphs import Graph, add_layout, add_loader, add_sampler, run_well, save_latent, saved_latent
from .test_errors import rejection

PARITY = 1e-4
LAYOUTS = {"Ulysses-2-TP-2": {"ulysses": 2, "tp": 2}, "TP-2": {"ulysses": 1, "tp": 2}}
QUANTIZED = (("int8_convrot", "TP-2"), ("nvfp4", "TP-2"))
FILES = {
    "fp32": lambda tensors: (tensors, {}),
    "fp8, a table in the header": lambda tensors: to_fp8(
        tensors, "metadata", matmul=True, input_scales={"single_blocks.0.linear1": 0.5}
    ),
    "fp8, a marker": lambda tensors: to_fp8(tensors, "scaled_fp8"),
}


@pytest.fixture(scope="module")
def folder(server):
    folder = server.models / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_file_loader(graph, name, **layout):
    return graph.add(
        "HybridDiT_LoadDiffusionModel", unet_name=name, layout=add_layout(graph, **layout), weight_dtype="default"
    )


def weight_bytes(server, result, node):
    """Of each rank."""
    report = json.loads(result.outputs[str(node)]["text"][0])
    return [rank["weight_bytes"]["transformer"] for rank in report["ranks"]]


@pytest.mark.parametrize(
    ("kind", "layout", "prefix"),
    [("fp32", "Ulysses-2-TP-2", ""), ("fp8, a table in the header", "TP-2", ""),
     ("fp8, a marker", "TP-2", "model.diffusion_model.")],
)  # fmt: skip
def test_the_same_latents_as_with_comfyuis_own_loader(server, folder, graph, kind, layout, prefix):
    tensors, metadata = FILES[kind](flux2_tensors(heads=4))
    name = write(folder / f"{kind.replace(' ', '_')}-{layout}.safetensors", tensors, prefix, metadata).name
    loader = add_loader(graph)
    model = add_file_loader(graph, name, **LAYOUTS[layout])
    stock = graph.add("UNETLoader", unet_name=name, weight_dtype="default")
    latents = [save_latent(graph, add_sampler(graph, loader, model=each, steps=3)) for each in (model, stock)]
    result = run_well(server, graph)
    ours, theirs = (saved_latent(server, result, latent) for latent in latents)
    assert relative_error(ours, theirs) <= PARITY
    graph = Graph()
    report = graph.add("HybridDiT_WorkersReport", model=add_file_loader(graph, name, **LAYOUTS[layout]))
    held = weight_bytes(server, run_well(server, graph), report)
    elements = sum(tensor.numel() for tensor in tensors.values())
    # Four bytes each in fp32, hardly more than one where the blocks' linears stay in fp8.
    assert max(held) <= elements / 2 * (1.9 if kind.startswith("fp8") else 4.2)


@needs_kitchen
@pytest.mark.parametrize(
    ("form", "layout"),
    [pytest.param(form, layout, marks=[] if (form, layout) in QUANTIZED else [pytest.mark.thorough])
     for form in FORMATS if form != "awq"  # which this ComfyUI does not read
     for layout in ("one", "TP-2", "TP-4", "Ulysses-2", "Ring-2", "Ulysses-2-TP-2")],
)  # fmt: skip
def test_quantized_weights(server, folder, graph, form, layout):
    """As near to the exact model as ComfyUI's own loader of the same file, and to that."""
    name = f"{form}.safetensors"
    if not (folder / name).exists():
        # ComfyUI's reader knows no name for scales of a power of two.
        stored, metadata, _ = quantize(flux2_tensors(heads=4), form, as_bytes=form == "mxfp8")
        write(folder / name, stored, metadata=metadata)
    degrees = {"one": {}, "TP-4": {"tp": 4}, "TP-2": {"tp": 2}, "Ulysses-2": {"ulysses": 2}, "Ring-2": {"ring": 2},
               "Ulysses-2-TP-2": {"ulysses": 2, "tp": 2}}[layout]  # fmt: skip
    place = add_layout(graph, **{"ulysses": 1, "ring": 1, "tp": 1} | degrees)
    loader = add_loader(graph)
    kinds = [("HybridDiT_LoadDiffusionModel", "default"), ("HybridDiT_LoadDiffusionModel", "float32"),
             ("HybridDiT_LoadDiffusionModel", "as storage"), ("UNETLoader", "default")]  # fmt: skip
    latents, models, reports = [], [], []
    for node, weight_dtype in kinds:
        given = {} if node == "UNETLoader" else {"layout": place}
        models.append(graph.add(node, unet_name=name, weight_dtype=weight_dtype, **given))
        latents.append(save_latent(graph, add_sampler(graph, loader, model=models[-1], steps=2)))
        if given:
            reports.append(graph.add("HybridDiT_WorkersReport", model=models[-1]))
    result = run_well(server, graph)
    ours, exact, stored, theirs = (saved_latent(server, result, latent) for latent in latents)
    assert relative_error(stored, exact) <= PARITY
    rounding = relative_error(theirs, exact)
    assert (rounding > 10 * PARITY) == (form in NATIVE)
    # Inputs of every layer are rounded to few bits, so what differs in the last bits of fp32 ends in other roundings.
    assert rounding / 2 - PARITY <= relative_error(ours, exact) <= max(1.3 * rounding, PARITY)
    assert relative_error(ours, theirs) <= max(1.5 * rounding, PARITY)
    # The report and the node say what weights are held as, and how they are multiplied.
    title = KNOWN[FORMATS[form][0]].title
    ways = ["units" if form in NATIVE else "dequantized", "", "dequantized"]
    for model, report, way in zip(models, reports, ways, strict=False):
        held = f"{title} ({way})" if way else ""
        for rank in json.loads(result.outputs[str(report)]["text"][0])["ranks"]:
            assert [name for name in rank["weight_formats"]["transformer"] if "(" in name] == [held] * bool(held)
        ready = [text.splitlines()[0] for node, text in result.texts if node == str(model) and "ready:" in text]
        assert ready[-1].endswith(f", {held}" if held else "CPU process" if layout == "one" else "CPU processes")


def test_scales_of_rows(server, folder, graph):
    """ComfyUI's own loader does not read them: it gets what they stand for."""
    stored, meant = to_fp8_rows(flux2_tensors(heads=4), part="blocks")
    names = [write(folder / f"rows-{name}.safetensors", t).name for name, t in (("fp8", stored), ("fp32", meant))]
    loader = add_loader(graph)
    models = (
        add_file_loader(graph, names[0], **LAYOUTS["TP-2"]),
        graph.add("UNETLoader", unet_name=names[1], weight_dtype="default"),
    )
    latents = [save_latent(graph, add_sampler(graph, loader, model=model, steps=3)) for model in models]
    result = run_well(server, graph)
    ours, theirs = (saved_latent(server, result, latent) for latent in latents)
    assert relative_error(ours, theirs) <= PARITY


def test_a_damaged_file_is_refused_before_anything_runs(server, folder, graph):
    tensors = flux2_tensors(heads=4)
    del tensors["single_blocks.1.linear2.weight"]
    name = write(folder / "incomplete.safetensors", tensors).name
    model = add_file_loader(graph, name)
    save_latent(graph, add_sampler(graph, add_loader(graph), model=model))
    message = rejection(server, graph, model)
    assert "incomplete.safetensors: there is no tensor single_blocks.1.linear2.weight" in message


def test_a_file_outside_the_folders_is_refused(server, folder, graph):
    model = add_file_loader(graph, "../../outside.safetensors")
    save_latent(graph, add_sampler(graph, add_loader(graph), model=model))
    assert "unet_name" in rejection(server, graph, model)
