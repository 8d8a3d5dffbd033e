"""Load CLIP (Parallel) in the place of ComfyUI's own loader: the same file, the same conditioning."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.errors import relative_error
from tests.single_file import flux2_tensors, write
from tests.text_encoder_file import comfy_config, text_tensors, text_to_fp8, write_text

from .conftest import EXAMPLE_IMAGE
from .graphs import Graph, add_latent, add_layout, run_well, save_latent, saved_latent
from .processes import worker_ranks
from .test_errors import failure, rejection

PARITY = 1e-4
"""Both sides compute in fp32 from the same numbers, but add in another order. A wrong layer, position, mask or token
gives 1e-2 and more, weights that are rounded to bf16 give 1e-3 and more."""
LAYOUT = {"ulysses": 2, "tp": 1}
FOUR = {"ulysses": 2, "tp": 2}
PROMPTS = {
    "a sentence": "a red circle on a blue square",
    "nothing": "",
    "weights are not parsed": "(a red circle:1.5) [in] the ((rain))",
    "other scripts": "ein Käse, 猫と犬 🦊",
    "an embedding that is not there": "a photo of embedding:nowhere in the sky",
    "more than 512 tokens": "a dragon flying over the sea, " * 40,
}
_names = itertools.count()


@pytest.fixture(scope="module")
def folder(server):
    folder = server.models / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def file(folder):
    return write_text(folder / "tiny_mistral.safetensors")


def add_clip(graph, name, layout=None, **inputs):
    layout = add_layout(graph, **(layout or LAYOUT))
    return graph.add("HybridDiT_LoadCLIP", clip_name=name, type="flux2", layout=layout, **inputs)


def add_reference(graph, name, **size):
    return graph.add("ReferenceTextEncoder", clip_name=name, config=json.dumps(comfy_config(**size)))


def save_conditioning(graph, conditioning):
    return graph.add("ReferenceSaveConditioning", conditioning=conditioning, name=f"conditioning{next(_names)}")


def saved_conditioning(server, result, node):
    return load_file(server.output / result.outputs[str(node)]["text"][0])


def assert_equal(server, name, prompts, layout=None, option=None, size=None, **inputs):
    """Both CLIPs give the same conditioning, masks and all, for each prompt."""
    graph = Graph()
    nodes = []
    for clip in (add_clip(graph, name, layout, **inputs), add_reference(graph, name, **(size or {}))):
        if option is not None:
            clip = graph.add("ReferenceTokenizerOption", clip=clip, name=option[0], value=option[1])
        nodes.append([save_conditioning(graph, graph.add("CLIPTextEncode", text=text, clip=clip)) for text in prompts])
    result = run_well(server, graph)
    for ours, theirs in zip(*nodes, strict=True):
        actual, expected = (saved_conditioning(server, result, node) for node in (ours, theirs))
        assert set(actual) == set(expected) >= {"cond", "attention_mask"}
        for key, tensor in expected.items():
            assert relative_error(actual[key], tensor) <= PARITY, key
        yield expected


@pytest.mark.parametrize("kind", ["bf16", "comfy_quant", "scaled_fp8"])
def test_the_conditioning_of_each_kind_of_file(server, folder, kind):
    name = write_text(folder / f"{kind}.safetensors", kind).name
    for expected in assert_equal(server, name, ["a red circle on a blue square", ""]):
        assert expected["cond"].shape[-1] == 192
        assert expected["cond"].std() > 0.1


def test_each_kind_of_prompt(server, file):
    lengths = [expected["cond"].shape[1] for expected in assert_equal(server, file.name, PROMPTS.values())]
    assert lengths[-1] > 512
    assert len(set(lengths)) == len(PROMPTS)


def test_padding(server, file):
    (expected,) = assert_equal(server, file.name, ["a cat"], option=("mistral3_24b_min_length", 300))
    assert expected["cond"].shape[1] == 300


def test_tokens_that_are_masked(server, file):
    # For ComfyUI token 0 ends a text: it and what follows it are hidden from the others.
    (expected,) = assert_equal(server, file.name, ["a red circle<unk> on a blue square"])
    assert 0 < expected["attention_mask"].sum() < expected["attention_mask"].numel()


def test_two_texts_in_one_batch(server, file):
    """With weights ComfyUI adds a third text, of masked padding."""
    graph, nodes = Graph(), []
    for clip in (add_clip(graph, file.name), add_reference(graph, file.name)):
        clip = graph.add("ReferenceTokenizerOption", clip=clip, name="mistral3_24b_min_length", value=400)
        for weight in (1.0, 1.4):
            both = graph.add("ReferenceEncodeTogether", clip=clip, first="a cat", second="two dogs", weight=weight)
            nodes.append(save_conditioning(graph, both))
    result = run_well(server, graph)
    light, heavy, *expected = (saved_conditioning(server, result, node) for node in nodes)
    for ours, theirs in zip((light, heavy), expected, strict=True):
        assert theirs["cond"].shape[1] == 2 * 400
        for key, tensor in theirs.items():
            assert relative_error(ours[key], tensor) <= PARITY, key
    assert relative_error(heavy["cond"], light["cond"]) > 1e-2


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [pytest.param("float32", (0, PARITY), marks=pytest.mark.thorough), ("bfloat16", (1e-3, 0.1))],
)
def test_a_number_format_that_is_chosen(server, file, dtype, bounds):
    """bf16 has 8 bits: rounding to them in 30 layers costs a few percent, and not nothing."""
    graph = Graph()
    clips = add_clip(graph, file.name, weight_dtype=dtype), add_reference(graph, file.name)
    nodes = [save_conditioning(graph, graph.add("CLIPTextEncode", text="a red circle", clip=clip)) for clip in clips]
    result = run_well(server, graph)
    ours, theirs = (saved_conditioning(server, result, node)["cond"] for node in nodes)
    assert bounds[0] <= relative_error(ours, theirs) <= bounds[1]


@pytest.mark.parametrize(
    ("layers", "kv_heads", "layout"),
    [
        # As in tests/distributed.
        pytest.param(40, 2, {"ulysses": 1, "tp": 2}, marks=pytest.mark.thorough),
        pytest.param(30, 1, FOUR, marks=pytest.mark.thorough),
        (40, 4, {"ulysses": 1, "tp": 1}),
    ],
    ids=["40 layers, TP-2", "one kv head, 4 ranks", "one process"],
)
def test_other_sizes_and_layouts(server, folder, layers, kv_heads, layout):
    name = write_text(folder / f"layers{layers}_kv{kv_heads}.safetensors", layers=layers, kv_heads=kv_heads).name
    list(assert_equal(server, name, ["a red circle"], layout, size={"kv_heads": kv_heads}))


def test_an_encoder_in_host_memory(server, file):
    list(assert_equal(server, file.name, ["a dog", "a cat", "a dog"], encoder_memory="host"))


def test_a_picture_of_it_with_a_file_s_transformer(server, file):
    """Both loaders with one layout share their workers; a stock model and CLIP give the same latent."""
    models = server.models / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    name = write(models / "with_clip.safetensors", flux2_tensors(heads=4)).name
    graph = Graph()
    layout = add_layout(graph, **LAYOUT)
    ours = (
        graph.add("HybridDiT_LoadDiffusionModel", unet_name=name, layout=layout),
        graph.add("HybridDiT_LoadCLIP", clip_name=file.name, type="flux2", layout=layout),
    )
    stock = graph.add("UNETLoader", unet_name=name, weight_dtype="default"), add_reference(graph, file.name)
    latents = []
    for model, clip in (ours, stock):
        positive = graph.add("CLIPTextEncode", text="a red circle", clip=clip)
        sampler = graph.add(
            "KSampler", model=model, positive=positive, negative=positive, latent_image=add_latent(graph), seed=3,
            steps=3, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        latents.append(save_latent(graph, sampler))
    before = set(worker_ranks(server))
    result = run_well(server, graph)
    actual, expected = (saved_latent(server, result, latent) for latent in latents)
    assert relative_error(actual, expected) <= PARITY
    assert len(set(worker_ranks(server)) - before) in (0, 2)


STYLES = ("text_encoders.mistral3_24b.transformer.model.", "text_encoders.transformer.model.", "lora_te_")


def write_lora(server, name, styles=STYLES):
    """A LoRA of every layer's linears, the weight of the tokens and the norms, its names of each of ``styles`` in turn.

    Only names with dots reach norms.
    """
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for number, (key, weight) in enumerate(text_tensors().items()):
        style = styles[number % len(styles)]
        base = key.removeprefix("model.").removesuffix(".weight")
        if key == "tekken_model":
            continue
        if weight.ndim == 1:
            tensors[f"{STYLES[0]}{base}.diff"] = 0.1 * torch.randn(weight.shape, generator=generator)
            continue
        rows, columns = weight.shape
        base = style + (base.replace(".", "_") if style.endswith("_") else base)
        tensors[f"{base}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * columns**-0.5
        tensors[f"{base}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    folder = server.models / "loras"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return name


def with_lora(graph, clip, name, strength):
    # Any model will do, as the LoRA has nothing for one.
    return graph.add(
        "LoraLoader", model=graph.add("ReferencePipelineLoader", pipeline="tiny"), clip=clip, lora_name=name,
        strength_model=1.0, strength_clip=strength,
    ), 1  # fmt: skip


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=pytest.mark.thorough) for layout in ({"ulysses": 1, "tp": 1}, {"ulysses": 1, "tp": 2})]
    + [FOUR],
    ids=str,
)
def test_a_lora(server, file, layout):
    """On 4 ranks two hold a kv head each. Taken off, the text encoder is as before, to the bit."""
    name, graph, nodes = write_lora(server, "for-text.safetensors"), Graph(), []
    for clip in (add_clip(graph, file.name, layout), add_reference(graph, file.name)):
        for strength in (None, 0.7, -0.4, None):
            one = clip if strength is None else with_lora(graph, clip, name, strength)
            nodes.append(save_conditioning(graph, graph.add("CLIPTextEncode", text=f"a {strength} cat", clip=one)))
    for clip in (add_clip(graph, file.name, layout), add_reference(graph, file.name)):
        one = with_lora(graph, clip, name, 0.7)
        nodes.append(save_conditioning(graph, graph.add("CLIPTextEncode", text="a None cat", clip=one)))
    result = run_well(server, graph)
    found = [saved_conditioning(server, result, node)["cond"] for node in nodes]
    for ours, theirs in (*zip(found[:4], found[4:8], strict=True), found[8:]):
        assert relative_error(ours, theirs) <= PARITY
    assert torch.equal(found[0], found[3])
    assert relative_error(found[8], found[0]) > 100 * PARITY


def test_a_lora_on_an_encoder_in_fp8(server, folder):
    """Nearer to what the file's weights stand for than stock, which rounds the sum to 8 bits again."""
    stored, _ = text_to_fp8(text_tensors(), "comfy_quant")
    scales = {key.removesuffix("_scale"): value for key, value in stored.items() if key.endswith(".weight_scale")}
    exact = {
        key: tensor if tensor.dtype == torch.uint8 else tensor.float() * scales.get(key, 1.0)
        for key, tensor in stored.items()
        if not key.endswith((".weight_scale", ".comfy_quant"))
    }
    write(folder / "lora-exact.safetensors", exact)
    name, lora = write_text(folder / "lora-fp8.safetensors", "comfy_quant").name, write_lora(server, "fp8.safetensors")
    graph = Graph()
    nodes = [
        save_conditioning(graph, graph.add("CLIPTextEncode", text="a cat", clip=with_lora(graph, clip, lora, 0.3)))
        for clip in (
            add_clip(graph, name),
            add_reference(graph, name),
            add_reference(graph, "lora-exact.safetensors"),
        )
    ]
    result = run_well(server, graph)
    ours, rounded, wanted = (saved_conditioning(server, result, node)["cond"] for node in nodes)
    assert relative_error(ours, wanted) < 0.2 * relative_error(rounded, wanted)


class TestRefusals:
    def test_a_file_without_a_tokenizer(self, server, folder):
        tensors = text_tensors()
        del tensors["tekken_model"]
        self.refused(server, write(folder / "no_tokenizer.safetensors", tensors).name, "has no tokenizer")

    def test_another_text_encoder(self, server, folder):
        tensors = {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
        self.refused(server, write(folder / "t5.safetensors", tensors).name, "t5.safetensors looks like T5")

    def test_a_type_that_is_not_supported(self, server, file):
        graph = Graph()
        clip = graph.add("HybridDiT_LoadCLIP", clip_name=file.name, type="ltxv", layout=add_layout(graph))
        save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=clip))
        assert "type" in rejection(server, graph, clip)

    def test_a_file_outside_the_folders(self, server, file):
        self.refused(server, "../../outside.safetensors", "clip_name")

    def test_a_tokenizer_that_is_damaged(self, server, folder):
        tensors = text_tensors()
        tensors["tekken_model"] = tensors["tekken_model"][:-50].clone()
        name = write(folder / "cut_tokenizer.safetensors", tensors).name
        graph = Graph()
        save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=add_clip(graph, name)))
        error = server.run(graph).error
        assert "the tokenizer in" in error["exception_message"]
        assert "cut_tokenizer.safetensors cannot be read" in error["exception_message"]

    def test_clip_set_last_layer(self, server, file):
        graph = Graph()
        clip = graph.add("CLIPSetLastLayer", clip=add_clip(graph, file.name), stop_at_clip_layer=-2)
        save_conditioning(graph, graph.add("CLIPTextEncode", text="a cat", clip=clip))
        error = server.run(graph).error
        assert '"CLIP Set Last Layer" (node' in error["exception_message"]
        assert "asks for layer -2" in error["exception_message"]

    def test_generating_text(self, server, file):
        graph = Graph()
        clip = add_clip(graph, file.name)
        node = graph.add("TextGenerate", clip=clip, prompt="a", max_length=4, sampling_mode="off")
        graph.add("PreviewAny", source=node)
        assert "cannot generate text" in failure(server, graph, node)

    def test_an_embedding(self, server, file):
        embeddings = server.models / "embeddings"
        embeddings.mkdir(exist_ok=True)
        save_file({"emb": torch.ones(2, 5120)}, embeddings / "somebody.safetensors")
        graph = Graph()
        clip = add_clip(graph, file.name)
        encode = graph.add("CLIPTextEncode", text="a photo of embedding:somebody here", clip=clip)
        save_conditioning(graph, encode)
        assert "remove 'embedding:...' from the prompt" in failure(server, graph, encode)

    def test_an_image(self, server, file):
        graph = Graph()
        image = graph.add("LoadImage", image=EXAMPLE_IMAGE)
        clip = add_clip(graph, file.name)
        encode = graph.add("ReferenceEncodeWithImage", clip=clip, image=image, text="a cat")
        save_conditioning(graph, encode)
        assert "gives the text encoder in the parallel workers images" in failure(server, graph, encode)

    def test_saving(self, server, file):
        graph = Graph()
        node = graph.add("CLIPSave", clip=add_clip(graph, file.name), filename_prefix="saved-clip")
        assert "neither merged nor saved" in failure(server, graph, node)
        assert not list(server.output.glob("saved-clip*"))

    @staticmethod
    def refused(server, name, words):
        graph = Graph()
        clip = add_clip(graph, name)
        save_conditioning(graph, graph.add("CLIPTextEncode", text="", clip=clip))
        assert words in rejection(server, graph, clip)
