"""Load CLIP (Parallel) with the type wan: umT5 over all workers, the conditioning that ComfyUI's own gives."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.errors import relative_error
from tests.single_file import write
from tests.umt5_file import comfy_config, umt5_tensors, write_umt5

from .graphs import Graph, add_layout, run_well
from .test_errors import failure, rejection
from .test_load_clip import LAYOUT, PARITY, save_conditioning, saved_conditioning

PROMPTS = {
    "a sentence": "a red circle on a blue square",
    "nothing": "",
    "weights": "(a red circle:1.5) [on] the ((blue square))",
    "other scripts": "ein Käse, 猫と犬",
    "an embedding that is not there": "a photo of embedding:nowhere in the sky",
    "more than 512 tokens": "a red circle on the blue square, " * 80,
}


@pytest.fixture(scope="module")
def folder(server):
    folder = server.models / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def file(folder):
    return write_umt5(folder / "tiny_umt5.safetensors")


def add_clip(graph, name, layout=None):
    layout = add_layout(graph, **(layout or LAYOUT))
    return graph.add("HybridDiT_LoadCLIP", clip_name=name, type="wan", layout=layout)


def add_reference(graph, name, **size):
    return graph.add("ReferenceTextEncoder", clip_name=name, type="wan", config=json.dumps(comfy_config(**size)))


def assert_equal(server, name, prompts, layout=None, size=None, lora=None):
    """Both CLIPs give the same conditioning for each prompt, and nothing beside it."""
    graph, nodes = Graph(), []
    for clip in (add_clip(graph, name, layout), add_reference(graph, name, **(size or {}))):
        if lora is not None:
            model = graph.add("ReferencePipelineLoader", pipeline="tiny")
            clip = (graph.add("LoraLoader", model=model, clip=clip, lora_name=lora, strength_model=1.0,
                              strength_clip=0.7), 1)  # fmt: skip
        nodes.append([save_conditioning(graph, graph.add("CLIPTextEncode", text=text, clip=clip)) for text in prompts])
    result = run_well(server, graph)
    found = []
    for ours, theirs in zip(*nodes, strict=True):
        actual, expected = (saved_conditioning(server, result, node) for node in (ours, theirs))
        assert set(actual) == set(expected) == {"cond"}
        assert expected["cond"].abs().max() > 1  # most of it is padding, and zero
        assert relative_error(actual["cond"], expected["cond"]) <= PARITY
        found.append(expected["cond"])
    return found


@pytest.mark.parametrize("kind", ["fp16", "scaled_fp8", "comfy_quant"])
def test_each_kind_of_file(server, folder, kind):
    name = write_umt5(folder / f"umt5_{kind}.safetensors", kind).name
    assert_equal(server, name, [PROMPTS["a sentence"]])


def test_each_kind_of_prompt(server, file):
    found = assert_equal(server, file.name, PROMPTS.values())
    assert [one.shape[1] for one in found[:-1]] == [512] * (len(PROMPTS) - 1)
    assert found[-1].shape[1] > 512
    assert len({one.sum().item() for one in found}) == len(PROMPTS)
    assert not found[0][:, 200:].any()  # what is padding is zeros, which Wan attends to as well


@pytest.mark.parametrize(
    ("heads", "layout"),
    [
        (8, {"ulysses": 1, "tp": 1}),
        # As in tests/distributed.
        pytest.param(6, {"ulysses": 2, "tp": 2}, marks=pytest.mark.thorough),
        pytest.param(8, {"ulysses": 1, "ring": 3, "tp": 1}, marks=pytest.mark.thorough),
    ],
    ids=["one process", "6 heads on 4 ranks", "8 heads on 3 ranks"],
)
def test_other_sizes_and_layouts(server, folder, heads, layout):
    name = write_umt5(folder / f"umt5_{heads}_heads.safetensors", heads=heads).name
    assert_equal(server, name, ["a red circle"], layout, {"heads": heads})


def test_a_lora(server, file):
    loras = server.models / "loras"
    loras.mkdir(exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(3), {}
    for key, weight in umt5_tensors().items():
        if (".SelfAttention." in key and "bias" not in key) or "DenseReluDense" in key:
            base = f"text_encoders.umt5xxl.transformer.{key.removesuffix('.weight')}"
            rows, columns = weight.shape
            tensors[f"{base}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
            tensors[f"{base}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, loras / "umt5-lora.safetensors")
    (plain,) = assert_equal(server, file.name, ["a red circle"])
    (patched,) = assert_equal(server, file.name, ["a red circle"], lora="umt5-lora.safetensors")
    assert relative_error(patched, plain) > 1e-2


class TestRefusals:
    def refused(self, server, name, *words):
        graph = Graph()
        clip = add_clip(graph, name)
        save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=clip))
        text = rejection(server, graph, clip)
        for word in words:
            assert word in text

    def test_a_file_without_a_tokenizer(self, server, folder):
        tensors = umt5_tensors()
        del tensors["spiece_model"]
        name = write(folder / "umt5_no_tokenizer.safetensors", tensors).name
        self.refused(server, name, "has no tokenizer", "umt5_xxl_fp16.safetensors")

    def test_a_t5_that_is_none(self, server, folder):
        tensors = umt5_tensors()
        del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
        name = write(folder / "t5_only.safetensors", tensors).name
        self.refused(server, name, "looks like T5", "ComfyUI's own Load CLIP loads it", "umt5_xxl_fp16.safetensors")

    def test_wans_own_file(self, server, folder):
        tensors = {"token_embedding.weight": torch.zeros(4, 4), "blocks.0.attn.q.weight": torch.zeros(4, 4)}
        tensors["blocks.0.pos_embedding.embedding.weight"] = torch.zeros(4, 4)
        name = write(folder / "umt5_of_wan.safetensors", tensors).name
        self.refused(
            server,
            name,
            "umT5 by the names of Wan's own code",
            "the file that ComfyUI's templates name",
            "umt5_xxl_fp16.safetensors",
        )

    def test_another_type(self, server, file):
        graph = Graph()
        clip = graph.add("HybridDiT_LoadCLIP", clip_name=file.name, type="qwen_image", layout=add_layout(graph))
        save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=clip))
        assert "choose the type 'wan'" in failure(server, graph, clip)

    def test_a_tokenizer_that_is_damaged(self, server, folder):
        tensors = umt5_tensors()
        tensors["spiece_model"] = tensors["spiece_model"][:-50].clone()
        name = write(folder / "umt5_cut_tokenizer.safetensors", tensors).name
        graph = Graph()
        clip = add_clip(graph, name)
        save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=clip))
        assert "umt5_cut_tokenizer.safetensors cannot be read" in failure(server, graph, clip)
