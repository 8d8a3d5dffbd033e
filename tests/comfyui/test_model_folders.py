"""A ComfyUI whose model folders are as people have them: nested, linked, from several places, partly unreadable."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.single_file import flux2_tensors, write
from tests.tiny_pipeline import make_tiny_pipeline
from tests.unit.test_model_folders import in_cache

from . import unreadable_folder
from .graphs import Graph, add_prompt, add_sampler, run_well, save_latent, saved_latent
from .server import ComfyServer
from .test_errors import rejection
from .test_nodes import NODES

NOT_TEXT = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def messy(comfyui, tiny, root):
    """A server whose extra_model_paths.yaml names more folders than there are."""
    first, second, lone = root / "first", root / "second", root / "lone" / "LONE"
    shutil.copytree(tiny, first / "ORG" / "NAME")
    shutil.copytree(tiny, lone)
    in_cache(first, tiny, "someone/cached")
    # One whose transformer is a link, and of whose name the first folder has something else.
    (first / "parts").mkdir()
    linked = shutil.copytree(tiny, second / "parts")
    shutil.move(linked / "transformer", root / "shared")
    (linked / "transformer").symlink_to(root / "shared")
    # What disks have beside models.
    (first / "lost+found").mkdir()
    (first / "locked").mkdir()
    (first / "broken").symlink_to("nowhere")
    (first / "long").symlink_to("n" * 300)
    (first / "round").symlink_to(first)
    (first / "notes.txt").write_text("")
    shutil.copytree(tiny, first / NOT_TEXT)
    models = root / "files"
    (models / "deep" / "locked").mkdir(parents=True)
    write(models / "deep" / "model.sft", flux2_tensors(heads=4))
    write(models / "plain.safetensors", {"a": torch.zeros(1)}).rename(models / f"{NOT_TEXT}.safetensors")
    (models / "broken.safetensors").symlink_to("nowhere")
    config = root / "extra_model_paths.yaml"
    config.write_text(
        f"mine:\n  base_path: {root}\n  is_default: true\n"
        "  diffusers: |\n    first/\n    second\n    lone/LONE\n    nowhere/\n  diffusion_models: files\n"
    )
    with ComfyServer(
        comfyui=comfyui,
        arguments=("--cpu", "--extra-model-paths-config", str(config)),
        environment={"HYBRID_DIT_HOME": str(root / "home"), "HYBRID_DIT_TEST_HOOKS": unreadable_folder.__file__},
    ) as server:
        yield server


def listed(server, node, name):
    return server.object_info(node)[node]["input"]["required"][name][1]["options"]


def loader_of(graph, name):
    return graph.add("HybridDiT_LoadPipeline", pipeline=name)


def drawn(graph, loader):
    return save_latent(graph, add_sampler(graph, loader, seed=7))


def test_all_nodes_are_there(messy):
    assert NODES.keys() <= messy.object_info().keys()


def test_what_is_listed(messy):
    names = listed(messy, "HybridDiT_LoadPipeline", "pipeline")
    assert set(names) == {"ORG/NAME", "someone/cached", "parts", "LONE", NOT_TEXT, "flux2-demo"}
    files = listed(messy, "HybridDiT_LoadDiffusionModel", "unet_name")
    assert files == [f"{NOT_TEXT}.safetensors", "deep/model.sft"]


@pytest.mark.parametrize("name", ["ORG/NAME", "someone/cached", "parts", "LONE"])
def test_each_of_them_draws(messy, name):
    graph = Graph()
    latent = drawn(graph, loader_of(graph, name))
    assert saved_latent(messy, run_well(messy, graph), latent).std() > 0.1


def test_a_changed_file_behind_a_link_is_loaded_anew(messy, root):
    def draw():
        graph = Graph()
        loader = loader_of(graph, "parts")
        latent = drawn(graph, loader)
        result = run_well(messy, graph)
        return saved_latent(messy, result, latent), str(loader) in result.cached_nodes()

    before, _ = draw()
    assert draw()[1]
    (file,) = (root / "shared").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"] *= -1
    save_file(tensors, file)
    after, cached = draw()
    assert not cached
    assert (after - before).abs().max() > 0.1


def test_an_sft_file_draws(messy):
    graph = Graph()
    loader = loader_of(graph, "ORG/NAME")
    model = graph.add("HybridDiT_LoadDiffusionModel", unet_name="deep/model.sft")
    latent = save_latent(graph, add_sampler(graph, loader, model=model, positive=add_prompt(graph, loader)))
    assert saved_latent(messy, run_well(messy, graph), latent).std() > 0.1


class TestRefusals:
    def test_a_link_that_leads_nowhere(self, messy):
        graph = Graph()
        model = graph.add("HybridDiT_LoadDiffusionModel", unet_name="broken.safetensors")
        save_latent(graph, add_sampler(graph, loader_of(graph, "ORG/NAME"), model=model))
        assert "it is a link that leads nowhere" in rejection(messy, graph, model)

    @pytest.mark.parametrize("name", ["../first/ORG/NAME", "/etc", "ORG/../ORG/NAME", "ORG//NAME", ""])
    def test_a_path(self, messy, name):
        graph = Graph()
        loader = loader_of(graph, name)
        drawn(graph, loader)
        assert f"{name!r} is not the name of a pipeline folder" in rejection(messy, graph, loader)

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_a_name_that_is_no_text(self, messy, kind):
        graph = Graph()
        good = loader_of(graph, "ORG/NAME")
        if kind == "folder":
            node = loader_of(graph, NOT_TEXT)
            drawn(graph, node)
        else:
            node = graph.add("HybridDiT_LoadDiffusionModel", unet_name=f"{NOT_TEXT}.safetensors")
            save_latent(graph, add_sampler(graph, good, model=node))
        text = rejection(messy, graph, node)
        assert "is not UTF-8" in text
        assert "caf\\xe9" in text
