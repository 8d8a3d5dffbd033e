"""Load Checkpoint (Parallel) in the place of ComfyUI's own loader: the same file, the same pictures."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.all_in_one import KINDS, MODEL, TEXT, VAE, write_flux2
from tests.errors import relative_error
from tests.single_file import flux2_tensors, write

from .conftest import EXAMPLE_IMAGE, KLEIN
from .graphs import Graph, add_latent, add_layout, add_sampler, run_well, save_latent, saved_latent
from .qwen_models import PIPELINE
from .test_errors import failure, rejection
from .test_load_clip import save_conditioning, saved_conditioning

PARITY = 1e-4
LAYOUT = {"ulysses": 2, "tp": 1}


def checkpoints(server):
    folder = server.models / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def ours(graph, name, layout=None, **inputs):
    layout = add_layout(graph, **(layout or LAYOUT))
    return graph.add("HybridDiT_LoadCheckpoint", ckpt_name=name, layout=layout, **inputs)


def stock(graph, name):
    return graph.add("CheckpointLoaderSimple", ckpt_name=name)


def picture(graph, loader, text="a red circle on a blue square"):
    """Nodes that save a latent, a decoded picture's latent, and the conditioning."""
    prompt = graph.add("CLIPTextEncode", text=text, clip=(loader, 1))
    image = graph.add("ImageScale", image=graph.add("LoadImage", image=EXAMPLE_IMAGE), width=128, height=128,
                      upscale_method="bilinear", crop="disabled")  # fmt: skip
    encoded = graph.add("VAEEncode", pixels=image, vae=(loader, 2))
    latent = add_sampler(graph, loader, positive=prompt, latent_image=encoded, denoise=0.7, steps=3)
    decoded = graph.add("VAEDecode", samples=latent, vae=(loader, 2))
    again = graph.add("VAEEncode", pixels=decoded, vae=(loader, 2))
    return save_latent(graph, latent), save_latent(graph, again), save_conditioning(graph, prompt)


def compare(server, first, second):
    """Both loaders' pictures and conditioning; ``first`` and ``second`` add one to a graph."""
    graph = Graph()
    nodes = [picture(graph, add(graph)) for add in (first, second)]
    result = run_well(server, graph, timeout=170)
    for (latent, decoded, prompt), (their_latent, their_decoded, their_prompt) in [tuple(nodes)]:
        for mine, other in ((latent, their_latent), (decoded, their_decoded)):
            expected = saved_latent(server, result, other)
            assert expected.std() > 0.1
            assert relative_error(saved_latent(server, result, mine), expected) <= PARITY
        mine, other = ((saved_conditioning(server, result, node)) for node in (prompt, their_prompt))
        assert mine.keys() == other.keys()
        assert relative_error(mine["cond"], other["cond"]) <= PARITY


# In `make test` the one that ComfyUI saved is compared, which has all parts, too.
@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_picture_as_with_comfyuis_own_loader(server, kind):
    name = write_flux2(checkpoints(server) / f"{kind}.safetensors", kind).name
    compare(server, lambda graph: ours(graph, name), lambda graph: stock(graph, name))


def test_a_checkpoint_that_comfyui_saved(server):
    """Its keys are those that the tests write, but for two ways to call norms and the VAE's; and it draws the same."""
    made = write_flux2(checkpoints(server) / "made.safetensors")
    graph = Graph()
    loader = stock(graph, made.name)
    graph.add("CheckpointSave", model=(loader, 0), clip=(loader, 1), vae=(loader, 2), filename_prefix="saved")
    run_well(server, graph)
    (saved,) = server.output.glob("saved*.safetensors")
    keys, expected = (
        {re.sub(r"(?<=norm)\.scale$", ".weight", key) for key in load_file(file) if not key.startswith(VAE)}
        for file in (saved, made)
    )
    assert keys == expected
    shutil.move(saved, checkpoints(server) / "saved.safetensors")
    compare(server, lambda graph: ours(graph, "saved.safetensors"), lambda graph: stock(graph, made.name))


def test_one_process_without_a_layout_and_files_of_their_own(server):
    """The same as with its parts in files of their own, by the other loaders, in the same workers."""
    made = write_flux2(checkpoints(server) / "parts.safetensors")
    tensors = load_file(made)
    for folder, prefix in (("diffusion_models", MODEL), ("text_encoders", TEXT), ("vae", VAE)):
        (server.models / folder).mkdir(exist_ok=True)
        part = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if folder == "text_encoders":
            part["tekken_model"] = tensors["text_encoders.tekken_model"]
        write(server.models / folder / "part.safetensors", part)
    graph = Graph()
    loader = graph.add("HybridDiT_LoadCheckpoint", ckpt_name=made.name)
    model = graph.add("HybridDiT_LoadDiffusionModel", unet_name="part.safetensors")
    clip = graph.add("HybridDiT_LoadCLIP", clip_name="part.safetensors", type="flux2")
    vae = graph.add("VAELoader", vae_name="part.safetensors")
    saves = []
    for nodes in (((loader, 0), (loader, 1), (loader, 2)), (model, clip, vae)):
        prompt = graph.add("CLIPTextEncode", text="a dog", clip=nodes[1])
        latent = add_sampler(graph, loader, model=nodes[0], positive=prompt, latent_image=add_latent(graph))
        image = graph.add("VAEDecode", samples=latent, vae=nodes[2])
        saves.append((save_latent(graph, latent), save_latent(graph, graph.add("VAEEncode", pixels=image, vae=vae))))
    result = run_well(server, graph)
    for mine, other in zip(*saves, strict=True):
        assert torch.equal(saved_latent(server, result, mine), saved_latent(server, result, other))
    report = graph.add("HybridDiT_WorkersReport", model=(loader, 0), after=image)
    held = json.loads(run_well(server, graph).outputs[str(report)]["text"][0])["ranks"][0]["weight_bytes"]
    assert held.keys() == {"transformer"}  # the text encoder is a model of its own, which can be freed alone


def test_a_text_encoder_that_the_workers_do_not_know_is_comfyuis_own(server):
    """FLUX.2 klein's, with a transformer that they know."""
    generator = torch.Generator().manual_seed(3)
    hidden, inner, kv, mlp = 64, 256, 128, 96

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    prefix = "text_encoders.qwen3_4b.transformer."
    text = {"model.embed_tokens.weight": matrix(151936, hidden) * 8, "model.norm.weight": torch.ones(hidden)}
    for index in range(KLEIN["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes = {"q": (inner, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, inner)}
        text |= {f"{layer}.self_attn.{part}_proj.weight": matrix(*shape) for part, shape in shapes.items()}
        text |= {f"{layer}.self_attn.{part}_norm.weight": torch.ones(128) for part in "qk"}
        text |= {f"{layer}.{part}_layernorm.weight": torch.ones(hidden) for part in ("input", "post_attention")}
        for part, shape in (("gate", (mlp, hidden)), ("up", (mlp, hidden)), ("down", (hidden, mlp))):
            text[f"{layer}.mlp.{part}_proj.weight"] = matrix(*shape)
    made = load_file(write_flux2(checkpoints(server) / "klein.safetensors"))
    tensors = {MODEL + key: tensor for key, tensor in flux2_tensors(heads=4, guidance=False).items()}
    tensors |= {key: tensor for key, tensor in made.items() if key.startswith(VAE)}
    name = write(
        checkpoints(server) / "klein.safetensors", tensors | {prefix + key: tensor for key, tensor in text.items()}
    ).name
    compare(server, lambda graph: ours(graph, name), lambda graph: stock(graph, name))
    assert f"do not know the text encoder qwen3_4b of {name}: ComfyUI runs it" in server.log_text()


@pytest.fixture(scope="module")
def saved(qwen):
    """What ComfyUI's Save Checkpoint makes of its own Qwen-Image."""
    graph = Graph()
    loader = graph.add("ReferencePipelineLoader", pipeline=PIPELINE)
    graph.add("CheckpointSave", model=(loader, 0), clip=(loader, 1), vae=(loader, 2), filename_prefix="qwen-saved")
    run_well(qwen, graph, timeout=300)
    (saved,) = qwen.output.glob("qwen-saved*.safetensors")
    shutil.move(saved, checkpoints(qwen) / "qwen.safetensors")
    return "qwen.safetensors"


@pytest.mark.thorough
@pytest.mark.timeout(600)  # which makes the pipelines, too
def test_the_same_edit_as_with_comfyuis_own_qwen_image(qwen, saved):
    """The text encoder looks at the picture, too, with its vision tower."""
    graph, saves = Graph(), []
    image = graph.add("ImageScale", image=graph.add("LoadImage", image=EXAMPLE_IMAGE), width=112, height=112,
                      upscale_method="bilinear", crop="disabled")  # fmt: skip
    for loader in (ours(graph, saved), graph.add("ReferencePipelineLoader", pipeline=PIPELINE)):
        prompt = graph.add("TextEncodeQwenImageEdit", prompt="make it blue", clip=(loader, 1), vae=(loader, 2),
                           image=image)  # fmt: skip
        latent = add_sampler(
            graph, loader, positive=prompt,
            latent_image=graph.add("EmptySD3LatentImage", width=112, height=112, batch_size=1),
        )  # fmt: skip
        again = graph.add("VAEEncode", pixels=graph.add("VAEDecode", samples=latent, vae=(loader, 2)),
                          vae=(loader, 2))  # fmt: skip
        saves.append((save_latent(graph, latent), save_latent(graph, again)))
    result = run_well(qwen, graph, timeout=400)
    for mine, other in zip(*saves, strict=True):
        expected = saved_latent(qwen, result, other)
        assert relative_error(saved_latent(qwen, result, mine), expected) <= PARITY


class TestRefusals:
    def refused(self, server, name, words):
        graph = Graph()
        loader = ours(graph, name)
        save_latent(graph, add_sampler(graph, loader, positive=graph.add("CLIPTextEncode", text="", clip=(loader, 1))))
        assert words in rejection(server, graph, loader)

    def test_something_that_no_part_has_a_place_for(self, server):
        more = {"conditioner.embedders.0.weight": torch.ones(2)}
        name = write_flux2(checkpoints(server) / "more.safetensors", more=more).name
        self.refused(server, name, "conditioner.embedders.0.weight in")

    def test_another_model(self, server):
        other = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}
        self.refused(server, write(checkpoints(server) / "sd.safetensors", other).name, "Stable Diffusion 1.5 or 2")

    def test_a_file_outside_the_folders(self, server):
        self.refused(server, "../../outside.safetensors", "there is no file")

    def test_parts_that_are_not_there(self, server):
        """As with ComfyUI's own loader: the MODEL is there, and who uses the others is told."""
        model = {MODEL + key: tensor for key, tensor in flux2_tensors(heads=4).items()}
        name = write(checkpoints(server) / "alone.safetensors", model).name
        graph = Graph()
        loader = ours(graph, name)
        prompt = graph.add("CLIPTextEncode", text="", clip=(loader, 1))
        save_latent(graph, add_sampler(graph, loader, positive=prompt))
        assert "does not contain a valid clip" in failure(server, graph, prompt)
        graph = Graph()
        decoded = graph.add("VAEDecode", samples=add_latent(graph), vae=(ours(graph, name), 2))
        graph.add("SaveImage", images=decoded, filename_prefix="none")
        assert "VAE is invalid" in failure(server, graph, decoded)
